"""How the layer types look, in every figure and on the page: one colour, one marker and one set of lines each."""

#: Colour (Okabe and Ito's palette) and matplotlib's marker of every layer type.
LOOK = {
    "conv2d": ("#000000", "o"),
    "decef": ("#0072B2", "s"),
    "basisconv": ("#E69F00", "^"),
    "basisconv2021": ("#CC79A7", ">"),
    "cpac": ("#009E73", "D"),
    "rank1": ("#D55E00", "v"),
}
#: The same colours for a dark page, lighter where they would hardly be seen there.
DARK = {
    "conv2d": "#F2F2F2",
    "decef": "#56B4E9",
    "basisconv": "#F0B53C",
    "basisconv2021": "#DC96BD",
    "cpac": "#1FBF93",
    "rank1": "#F07F2E",
}
#: `LOOK`'s markers as SVG paths that fill the square from -1 to 1.
PATHS = {
    "o": "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z",
    "s": "M-0.9,-0.9H0.9V0.9H-0.9Z",
    "^": "M0,-1L1,0.9H-1Z",
    ">": "M1,0L-0.9,1V-1Z",
    "D": "M0,-1.2L1.2,0L0,1.2L-1.2,0Z",
    "v": "M0,1L1,-0.9H-1Z",
}
