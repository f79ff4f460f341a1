"""Is this Python able to run the package? Asked once, before anything heavy is imported."""

from importlib import import_module


def environment_problem() -> str | None:
    """One line that says what keeps the package from running here and what to do, or None.

    A torchaudio that was built for another torch (PyPI's, beside a CPU-only torch) breaks `import transformers` itself.
    """
    try:
        import_module("torch")
        import_module("torchaudio")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return (
            f"musicrl_hf cannot start: torch and torchaudio do not fit together ({reason}). Make a fresh environment and "
            "let pip resolve both at once: python -m venv .venv && .venv/bin/pip install musicrl-hf"
        )
    return None
