"""Which checkpoints are whole, and which a kill, a full disk or a bad copy has cut off.

A LeMo run seals a checkpoint when everything else lies in it: `lemo_checkpoint.json` lists every file with its length and checksum.
Checkpoints without a seal (a kill came between the last file and the seal, or an older version wrote them) are judged by their
structure: Trainer writes `trainer_state.json` last, safetensors headers state the length, torch's files are zip archives whose
directory stands at the end.
"""

import errno
import json
import logging
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from ...errors import LemoError, LemoRunError
from ...hub.lemo_files import CONFIG_FILE, PREDICTORS_FILE, write_json

logger = logging.getLogger(__name__)

SEAL_FILE = "lemo_checkpoint.json"
STATE_FILE = "lemo_state.json"
# In the state file: how many processes wrote into the checkpoint; `None` if each node has a folder of its own.
PROCESSES_FIELD = "processes"
_RANDOM_STATE = re.compile(r"rng_state_(\d{1,6})\.pth")
_NAME = re.compile(r"checkpoint-(\d+)")
_CUT_PREFIX = "cut-"
# Checksums of larger files are those of their two ends: a step must not wait for gigabytes to be read again.
_READ_WHOLE = 64 * 2**20  # bytes
_END = 2**20  # bytes
# What writing to a disk that is full, over quota, limited or failing raises.
_WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}

_TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error")


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoint folders in an output folder, whole or not, the newest (by step) first."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()] if folder.is_dir() else []
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def seal(folder: Path) -> None:
    """Waits until every file of a finished checkpoint is on the disk, and lists them in it."""
    reason = _damage_by_structure(folder)
    if reason is not None:
        logger.warning("checkpoint is not sealed: %s; %s; the run goes on, resuming will pass it over", reason, folder)
        return
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL_FILE):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _checksum(path)]
    write_json(folder / SEAL_FILE, {"files": files})
    # An earlier attempt at the same step.
    shutil.rmtree(folder.with_name(_CUT_PREFIX + folder.name), ignore_errors=True)


def unseal(folder: Path) -> None:
    """Has a folder that is about to be written again count as cut off until it is whole."""
    for name in (SEAL_FILE, TRAINER_STATE_NAME):
        (folder / name).unlink(missing_ok=True)


def _checksum(path: Path) -> int:
    with path.open("rb") as file:
        size = path.stat().st_size
        if size <= _READ_WHOLE:
            return zlib.crc32(file.read())
        first = zlib.crc32(file.read(_END))
        file.seek(size - _END)
        return zlib.crc32(file.read(), first)


def damage(folder: str | Path) -> str | None:
    """Why a checkpoint cannot be resumed from, in a few words; `None` if it is whole."""
    folder = Path(folder)
    try:
        if not any(folder.iterdir()):
            return "the folder is empty"
        return _damage_by_seal(folder) if (folder / SEAL_FILE).is_file() else _damage_by_structure(folder)
    except OSError as error:
        return f"it cannot be read: {error}"


def _damage_by_seal(folder: Path) -> str | None:
    stored = _json(folder / SEAL_FILE)
    listed = stored.get("files") if isinstance(stored, dict) else None
    if not isinstance(listed, dict):
        return f"{SEAL_FILE} is damaged"
    for name, entry in listed.items():
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not (inside and isinstance(entry, list) and len(entry) == 2):
            return f"{SEAL_FILE} is damaged"
        path, (size, checksum) = folder / name, entry
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
        if _checksum(path) != checksum:
            return f"{name} holds other bytes than were saved"
    return None


def _damage_by_structure(folder: Path) -> str | None:
    state = folder / TRAINER_STATE_NAME
    if not state.is_file():
        return f"{TRAINER_STATE_NAME}, which is written last, is missing"
    stored = _json(state)
    step = stored.get("global_step") if isinstance(stored, dict) else None
    if not isinstance(step, int) or (_step_of(folder) >= 0 and step != _step_of(folder)):
        return f"{TRAINER_STATE_NAME} is damaged"
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        if path.suffix == ".safetensors" and (reason := _cut_tensors(path)):
            return f"{path.name} is cut off ({reason})"
        if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off ({path.stat().st_size} bytes)"
        if path.suffix == ".json" and _json(path) is None:
            return f"{path.name} is damaged"
    names = {path.name for path in files}
    if (missing_state := _missing_random_state(folder, names)) is not None:
        return f"{missing_state} is missing"
    weights = {name for name in names if name.endswith((".safetensors", ".bin", ".distcp")) and name != "training_args.bin"}
    if not weights - {PREDICTORS_FILE} and not any(folder.glob("global_step*")):
        return "it holds no weights"
    for name in (STATE_FILE, PREDICTORS_FILE, CONFIG_FILE):
        if name not in names:
            return f"{name} is missing"
    # With `save_only_model` none of them is there.
    groups = {
        OPTIMIZER_NAME: {name for name in names if name.startswith("optimizer")}
        or {path.name for path in folder.glob("optimizer_*")},
        SCHEDULER_NAME: names & {SCHEDULER_NAME},
        "rng_state.pth": {name for name in names if name.startswith("rng_state")},
    }
    missing = [name for name, found in groups.items() if not found]
    engine = any(folder.glob("global_step*"))  # DeepSpeed's own format
    return f"{missing[0]} is missing" if missing and len(missing) < len(groups) and not engine else None


def _missing_random_state(folder: Path, names: set[str]) -> str | None:
    """The first random state that is not there, of those that the run's processes have saved; without any, the rule for all of them holds."""
    if not any(name.startswith("rng_state") for name in names):
        return None
    ranks = [int(match[1]) for name in names if (match := _RANDOM_STATE.fullmatch(name))]
    stored = _json(folder / STATE_FILE) if STATE_FILE in names else None
    count = stored.get(PROCESSES_FIELD) if isinstance(stored, dict) else None
    needed = max([rank + 1 for rank in ranks] + [count if isinstance(count, int) and count > 1 else 0])
    return next((name for name in map("rng_state_{}.pth".format, range(needed)) if name not in names), None)


def _cut_tensors(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return " ".join(str(error).split())


def _json(path: Path) -> Any:
    """What a JSON file holds; `None` if it cannot be read to its end."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint of an output folder that is whole; one line in the log names newer ones that are not, and why.

    Args:
        folder: The run's `output_dir`.

    Returns:
        Its path, for `resume_from_checkpoint`, or `None` if there is none.
    """
    cut: list[str] = []
    for path in checkpoints(folder):
        reason = damage(path)
        if reason is None:
            if cut:
                logger.warning("%s; going on from %s", "; ".join(cut), path)
            return str(path)
        cut.append(f"{path.name} is not whole: {reason}")
    if cut:
        logger.warning("%s; %s holds no whole checkpoint", "; ".join(cut), folder)
    return None


def newest_whole(folder: str | Path) -> str | None:
    """The same without a word."""
    return next((str(path) for path in checkpoints(folder) if damage(path) is None), None)


def require_whole(folder: str | Path) -> None:
    """Looks at a checkpoint that was named.

    Raises:
        LemoError: If it is not whole, or does not exist.
    """
    if not Path(folder).is_dir():
        raise LemoError(f"checkpoint does not exist; {str(folder)!r}; name a checkpoint-N folder of the run")
    reason = damage(folder)
    if reason is not None:
        other = newest_whole(Path(folder).parent)
        fix = f"resume from {other}" if other else "start anew in another output_dir"
        raise LemoError(f"checkpoint is not whole: {reason}; {str(folder)!r}; {fix}")


def set_aside_cut(folder: Path, step: int) -> None:
    """Renames checkpoints beyond the step that a run goes on from, where they are not whole: `cut-checkpoint-<n>`.

    Trainer's rotation keeps the checkpoint of the highest step and deletes whole ones for it.
    """
    for path in checkpoints(folder):
        if _step_of(path) > step and damage(path) is not None:
            aside = path.with_name(_CUT_PREFIX + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


@contextmanager
def explained_write_errors(folder: Path, what: str, run: Path | None = None) -> Iterator[None]:
    """Turns what a full or failing disk raises into one line, and removes what it left half-written of a checkpoint.

    Args:
        folder: Where is written.
        what: What is written, for the message.
        run: The run's output folder, where it is neither `folder` nor, of a checkpoint, the one around it.

    Raises:
        LemoRunError: If a file could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_write_error(error):
            raise
        checkpoint = _NAME.fullmatch(folder.name) is not None
        if checkpoint and folder.is_dir() and damage(folder) is not None:
            shutil.rmtree(folder, ignore_errors=True)
        output = run or (folder.parent if checkpoint else folder)
        kept = newest_whole(output)
        fix = "resume from it" if kept else "resume, and the phases go on where they were saved" if checkpoint else "resume"
        reason = " ".join(str(error).split())[:160]
        raise LemoRunError(
            f"{what} could not be written ({reason}); {str(folder)!r}, {_free_bytes(output):,} bytes free; "
            f"last whole checkpoint: {kept or 'none yet'}; free some space, then {fix}"
        ) from error


def is_write_error(error: BaseException) -> bool:
    """Whether a disk refused to take what was written: by its number, or by what safetensors and torch make of it."""
    if isinstance(error, OSError):
        return error.errno in _WRITE_ERRORS
    text = str(error)
    if isinstance(error, SafetensorError):
        return "I/O error" in text or "os error" in text
    return isinstance(error, RuntimeError) and any(part in text for part in _TORCH_WRITE_ERRORS)


def _free_bytes(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(existing).free
