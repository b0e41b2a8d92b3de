"""What the two pictures of a landscape share: its colours, and the amino acids grouped by chemistry."""

from __future__ import annotations

COLOURS: tuple[str, ...] = (
    *("#591008", "#8f2c17", "#c05630", "#e08a5c", "#f2c3a3"),
    "#f8f6f2",
    *("#b5d0e4", "#74a9cf", "#3b7fb4", "#1c5690", "#0c2f5c"),
)
"""Evenly spaced from the lowest score over 0, in the middle, to the highest: red-brown to blue, which every common
colour blindness leaves apart, and darker the further from 0 on both sides, which a grey print keeps."""

CHEMISTRY: tuple[tuple[str, str], ...] = (
    ("positive", "HKR"),
    ("negative", "DE"),
    ("polar", "STNQ"),
    ("special", "CGP"),
    ("aliphatic", "AVILM"),
    ("aromatic", "FYW"),
)
"""Names of groups and their amino acids, from top to bottom."""
