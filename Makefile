# Two commands do everything on a fresh machine with Python 3.11:
#   make align   set up, then run the whole preference loop on the bundled models
#   make test    set up, then run the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: align test lint types tiny paper rehearsal clean

# One resolve in a fresh environment: torch and torchaudio must come from the same build.
$(STAMP): pyproject.toml
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), f'Python 3.11 or newer is needed, this is {sys.version}'"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $(STAMP)

align: $(STAMP)
	$(BIN)/musicrl align --recipe tiny --output_dir out/align

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# How the bundled models were made; hours. See recipes/README.md.
tiny: $(STAMP)
	$(BIN)/python -m pip install --quiet -r recipes/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r recipes/requirements-alone.txt
	$(BIN)/python recipes/run.py --work build/tiny

# The tables of MusicRL's paper on the bundled models, with simulated listeners: some fifteen hours of one core, and ten more at
# least for the parts "larger" and "guided". The judges need what `make tiny` needs (recipes/README.md). Leaves results/, and what
# README.md shows of it. recipes/paper/publish.py then bundles what was made, and model_cards/build.py writes its cards.
PAPER := build/paper
MADE := build/tiny
ROOT := .
SIZE :=
paper: $(STAMP)
	$(BIN)/python recipes/paper/run.py --work $(PAPER) $(SIZE)
	$(BIN)/python -m pip install --quiet -r recipes/requirements.txt "matplotlib>=3.8"
	$(BIN)/python -m pip install --quiet --no-deps -r recipes/requirements-alone.txt
	for stage in corpus render judges; do $(BIN)/python recipes/$$stage.py --work $(MADE) $(SIZE) || exit 1; done
	$(BIN)/python recipes/paper/judged.py --work $(PAPER) --recipe_work $(MADE)
	$(BIN)/python recipes/paper/judged.py --work $(PAPER) --recipe_work $(MADE) --part larger
	$(BIN)/python recipes/paper/judged.py --work $(PAPER) --recipe_work $(MADE) --part guided --draws 4
	$(BIN)/python recipes/paper/judged.py --work $(PAPER) --recipe_work $(MADE) --part guided --draws 4 --guidance 3 --systems base r u ru
	$(BIN)/python recipes/paper/gather.py --work $(PAPER) --out $(ROOT)/results/paper.json
	$(BIN)/python recipes/paper/tables.py --root $(ROOT)

# The same commands with a step or two of everything, in less than an hour: do they run here to their end? Leaves build/rehearsal alone.
REHEARSAL := build/rehearsal
rehearsal:
	mkdir -p $(REHEARSAL)
	cp -r README.md results $(REHEARSAL)
	$(MAKE) paper SIZE=--tiny PAPER=$(REHEARSAL)/paper MADE=$(REHEARSAL)/tiny ROOT=$(REHEARSAL)

clean:
	rm -rf $(VENV) build out runs
