"""The look of each layer type in all figures and on the report's page: one colour and one marker."""

from __future__ import annotations

from dataclasses import dataclass

#: SVG paths of markers by matplotlib's names; each fills the square from -1 to 1.
PATHS = {
    "o": "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z",
    "s": "M-0.9,-0.9H0.9V0.9H-0.9Z",
    "^": "M0,-1L1,0.9H-1Z",
    ">": "M1,0L-0.9,1V-1Z",
    "D": "M0,-1.2L1.2,0L0,1.2L-1.2,0Z",
    "v": "M0,1L1,-0.9H-1Z",
    "*": "M0,-1.1L0.26,-0.36L1.05,-0.34L0.42,0.14L0.65,0.89L0,0.44L-0.65,0.89L-0.42,0.14L-1.05,-0.34L-0.26,-0.36Z",
    "P": "M-0.35,-1H0.35V-0.35H1V0.35H0.35V1H-0.35V0.35H-1V-0.35H-0.35Z",
}


@dataclass(frozen=True)
class Look:
    """A layer type's colour (Okabe and Ito's palette), a lighter one for a dark page, and its matplotlib marker."""

    color: str
    dark: str
    marker: str

    @property
    def path(self) -> str:
        """The marker as an SVG path."""
        return PATHS[self.marker]


_LOOKS = {
    "conv2d": Look("#000000", "#F2F2F2", "o"),
    "decef": Look("#0072B2", "#56B4E9", "s"),
    "basisconv": Look("#E69F00", "#F0B53C", "^"),
    "basisconv2021": Look("#CC79A7", "#DC96BD", ">"),
    "cpac": Look("#009E73", "#1FBF93", "D"),
    "rank1": Look("#D55E00", "#F07F2E", "v"),
    "auto": Look("#7B3FA0", "#B98BE0", "*"),
}
_OTHER = Look("#777777", "#AAAAAA", "P")


def look_of(layer: str) -> Look:
    """A layer type's look; an unknown type is a grey plus."""
    return _LOOKS.get(layer, _OTHER)
