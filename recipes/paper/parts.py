"""The parts of run.py of which all runs are planned at once: those of the first seed, and what ships."""

from guided import guided
from larger import larger
from plan import ablations, curves, limits, methods

PLANS = {
    "methods": methods,
    "rewards": ablations,
    "curves": curves,
    "limits": limits,
    "larger": larger,
    "guided": guided,
}
