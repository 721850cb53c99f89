"""audioldm2.json: what a checkpoint says about itself to this package; diffusers ignores it.

    {"recommended": {"num_inference_steps": 20, "guidance_scale": 2.0}, ...}

`recommended` has arguments of the pipeline's call with which the checkpoint gives good results. Other entries
are for other parts of the package; they are not checked here, and a pipeline that is saved keeps them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from audioldm2.arguments import MAX_GUIDANCE, as_texts, check_count, check_length, check_number
from audioldm2.checkpoints.errors import CheckpointError
from audioldm2.checkpoints.tensors import read_json
from audioldm2.quoting import quoted

SETTINGS_FILE = "audioldm2.json"
RECOMMENDED = "recommended"
MAX_NEGATIVE_PROMPT = 1000  # characters


def _check_guidance(value: Any) -> None:
    check_number("guidance_scale", value)
    if abs(value) > MAX_GUIDANCE:
        raise ValueError(f"guidance_scale must be at most {MAX_GUIDANCE:g}, got {quoted(value)}")


def _check_negative_prompt(value: Any) -> None:
    if not isinstance(value, str) or len(value) > MAX_NEGATIVE_PROMPT:
        raise ValueError(
            f"negative_prompt must be a string of at most {MAX_NEGATIVE_PROMPT} characters, "
            f"got {quoted(value)}"
        )
    as_texts("negative_prompt", value, empty=True)


_CHECKS: dict[str, Callable[[Any], None]] = {
    "num_inference_steps": lambda value: check_count("num_inference_steps", value, highest=10_000),
    "guidance_scale": _check_guidance,
    "negative_prompt": _check_negative_prompt,
    "audio_length_in_s": check_length,
}


def read_settings(folder: Path) -> dict[str, Any]:
    """Read audioldm2.json.

    Args:
        folder: the checkpoint's.

    Returns:
        The content of the file; {} if the checkpoint has none. Of the recommended settings, those whose names
        are not known are left out, with a warning: a later version may know them.

    Raises:
        CheckpointError: the file cannot be read, or recommends a value that is not allowed.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        return {}
    content = read_json(path)
    if RECOMMENDED not in content:
        return content
    settings = content[RECOMMENDED]
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: {RECOMMENDED} must be a JSON object, got {quoted(settings)}")
    unknown = [name for name in settings if name not in _CHECKS]
    if unknown:
        warnings.warn(
            f"{path}: recommended settings that are not known are ignored: {quoted(unknown)}", stacklevel=4
        )
    known = {name: value for name, value in settings.items() if name in _CHECKS}
    try:
        check_recommended(known)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return {**content, RECOMMENDED: known}


def check_recommended(settings: Any) -> dict[str, Any]:
    """Check recommended settings.

    Returns:
        The settings as JSON can hold them.

    Raises:
        TypeError: `settings` is not a mapping.
        ValueError: a name is not known, or a value is not allowed.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(f"recommended settings must be a mapping, got {quoted(settings)}")
    for name, value in settings.items():
        if name not in _CHECKS:
            raise ValueError(f"{quoted(name)} cannot be recommended; the settings are {', '.join(_CHECKS)}")
        _CHECKS[name](value)
    # NumPy's numbers as Python's.
    return {name: value.item() if hasattr(value, "item") else value for name, value in settings.items()}


def recommended_for(settings: Mapping[str, Any], sampler: str) -> dict[str, Any]:
    """The recommended settings that are meant for a sampler.

    Args:
        settings: the checkpoint's.
        sampler: the name of its class. The number of steps is meant for DPM-Solver++, and UniPC needs no
            more.
    """
    fits = sampler in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
    return {name: value for name, value in settings.items() if fits or name != "num_inference_steps"}
