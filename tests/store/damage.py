"""What a disk or a person does to a file, in place: other names of it see the same."""

import shutil
from collections.abc import Callable
from pathlib import Path


def cut_to_nothing(file: Path) -> None:
    file.write_bytes(b"")


def cut_by_one_byte(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flip_first_bit(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 128]) + content[1:])


def flip_last_bit(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def remove(file: Path) -> None:
    """Of this name alone."""
    shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)


def replace_by_folder(file: Path) -> None:
    remove(file)
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut to nothing": cut_to_nothing,
    "cut by one byte": cut_by_one_byte,
    "longer": lengthen,
    "zero-filled": zero,
    "first bit": flip_first_bit,
    "last bit": flip_last_bit,
    "removed": remove,
    "a folder": replace_by_folder,
}


def swap(file: Path, other: Path) -> None:
    """The content of two files, in place."""
    mine, others = file.read_bytes(), other.read_bytes()
    file.write_bytes(others)
    other.write_bytes(mine)
