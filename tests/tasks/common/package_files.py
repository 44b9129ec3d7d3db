"""Small packages in their real formats, made from {name: content}: .deb, .tgz, .whl."""

import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

Files = Mapping[str, bytes]


def tar(files: Files, prefix: str = "") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name if name.startswith("/") else prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo(prefix + "link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return content.getvalue()


def ar(members: Files) -> bytes:
    content = b"!<arch>\n"
    for name, data in members.items():
        content += f"{name + '/':<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
        content += data + b"\n" * (len(data) % 2)
    return content


def write_deb(
    path: Path, files: Files, compress: Callable[[bytes], bytes] = lzma.compress, ending: str = ".xz"
) -> Path:
    data = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",
        f"data.tar{ending}": compress(tar(files, "./")),
    }
    path.write_bytes(ar(data))
    return path


def write_tgz(path: Path, files: Files) -> Path:
    path.write_bytes(gzip.compress(tar(files)))
    return path


def write_wheel(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path
