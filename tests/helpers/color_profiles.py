"""ICC profiles built byte by byte from the specification, and closed forms of the colours that they describe."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np


def s15(*values: float) -> bytes:
    """Encode numbers as s15Fixed16, ICC's fixed-point format."""
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ") -> bytes:
    """Build an ICC profile (version 2) with these tags, for a printer if the space is CMYK, else for a monitor."""
    tags = {b"desc": b"desc\0\0\0\0\0\0\0\2t\0" + bytes(78), b"wtpt": b"XYZ \0\0\0\0" + s15(*D50), **tags}
    body, table, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">2I", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    device = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s12x4s", at + len(body), b"lcms", 0x02400000, device, space, pcs, b"acsp")
    head += bytes(68 - len(head)) + s15(*D50)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


D50, D65 = np.array([0.9642, 1.0, 0.8249]), np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
SRGB = [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)]  # xy chromaticities of red, green, and blue
P3 = [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)]
ADOBE = [(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)]
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def to_xyz(primaries: list[tuple[float, float]]) -> np.ndarray:
    """Return the matrix from linear RGB to XYZ for these primaries and white point D65 (Lindbloom)."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return columns * np.linalg.solve(columns, D65)


def linear(levels: Any) -> np.ndarray:
    v = np.asarray(levels) / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def srgb_levels(light: np.ndarray) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def matrix_profile(primaries: list[tuple[float, float]], gamma: float | None) -> bytes:
    """Build a monitor's profile. `gamma=None` takes the curve of sRGB."""
    adapted = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ D65)) @ BRADFORD @ to_xyz(primaries)
    if gamma is None:
        points = np.round(linear(np.linspace(0, 255, 1024)) * 65535).astype(">u2")
        curve = b"curv\0\0\0\0" + struct.pack(">I", len(points)) + points.tobytes()
    else:
        curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    colorants = {name: b"XYZ \0\0\0\0" + s15(*one) for name, one in zip(names, adapted.T, strict=True)}
    return icc(b"RGB ", {**colorants, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)})


def expected_srgb(levels: np.ndarray, primaries: list[tuple[float, float]], gamma: float | None) -> np.ndarray:
    light = linear(levels) if gamma is None else (levels / 255) ** gamma
    return srgb_levels(light @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries)).T)
