"""Files of tensors that are whole or not there, and are read without running code from them."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch


def write_atomically(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it; a failure leaves an older file as it was.

    The file has the rights of the older one, without one those of any new file.

    Raises:
        OSError: it cannot be written; the error names ``path``.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    rights = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    temporary = str(path.with_name(f"{secrets.token_hex(8)}{path.suffix}"))
    mode = 0o666 if rights is None else rights | stat.S_IWUSR  # less the umask, as open() does
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        write(temporary)
        if rights is not None:
            os.chmod(temporary, rights)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (temporary, None):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def save_state(state: Any, path: str | os.PathLike) -> None:
    """``torch.save``, atomically."""
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_state(caller: str, path: str | os.PathLike) -> Any:
    """What :func:`save_state` wrote, on the CPU.

    Raises:
        TypeError: that is no path.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else than tensors in plain containers.
    """
    with _opened(caller, path) as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what torch raises for damaged files differs with the damage
            raise ValueError(f"{caller}: {path} is damaged or no file of {caller.split('.')[0]}") from _reason(error)


def save_arrays(arrays: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """``numpy.savez``, atomically, and without a suffix of its own."""

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    write_atomically(path, write)


def load_arrays(caller: str, path: str | os.PathLike) -> dict[str, np.ndarray]:
    """What :func:`save_arrays` wrote.

    Raises:
        TypeError: that is no path.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else than arrays of numbers and strings.
    """
    with _opened(caller, path) as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except Exception as error:  # what numpy and zipfile raise for damaged files differs with the damage
            what = f"{path} is damaged, or no npz file of numbers and strings"
            raise ValueError(f"{caller}: {what}") from _reason(error)


def _opened(caller: str, path: str | os.PathLike) -> BinaryIO:
    if not isinstance(path, str | os.PathLike):  # open takes a number for the file that has it, and closes that
        raise TypeError(f"{caller}: path must be a str or os.PathLike, got {type(path).__name__}")
    return open(path, "rb")


def _reason(error: Exception) -> Exception | None:
    """The error, but for those that advise to run the file's code."""
    return None if any(advice in str(error) for advice in ("weights_only", "allow_pickle")) else error
