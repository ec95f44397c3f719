"""Damage to a stored file."""

import pickle

DAMAGES = ("cut", "flipped", "empty", "pickle", "folder")


def damage(path, how):
    """Cut a file, flip a bit near its end, empty it, or replace it by a pickle or a folder."""
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[-5] ^= 1
        path.write_bytes(content)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "pickle":
        path.write_bytes(pickle.dumps({"5.weight": [0.0]}))
    else:
        path.unlink()
        path.mkdir()
