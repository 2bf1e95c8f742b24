"""Peak memory of a front end that prepares a small file of large frames, in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tests.integrations import media_files

__all__ = ["CASES", "Case"]

_ROOT = Path(__file__).parents[2]
_MEASURED = """
import json, resource, sys
from pathlib import Path
{prepare}
data = Path(sys.argv[1]).read_bytes()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
# what is loaded on first use
small = {small!r}
{load}(small)
before = peak()
patches = {load}(data)
print(json.dumps([list(patches.shape), peak() - before]))
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A video, and the bytes that a process may grow by until its patches are made.

    Attributes
    ----------
    frames : one a second
    size : of the file's frames, width and height
    shrunk : what they become
    most : bytes
    """

    frames: int
    size: tuple[int, int]
    shrunk: tuple[int, int]
    most: int

    def __str__(self) -> str:
        return f"{self.frames} of {self.size[0]}x{self.size[1]}"

    def grown_by(self, folder: Path, *, prepare: str, load: str) -> int:
        """Bytes by which a process grew, at most, while it made the patches.

        Parameters
        ----------
        folder : for the file
        prepare : statements before the measurement, imports above all
        load : name of a function of a file's bytes that returns patches [patches, values]
        """
        # as few bytes as one colour needs
        image = Image.new("RGB", self.size, (9, 99, 200))
        frame = media_files.encoded(image, "JPEG", optimize=True)
        path = folder / "large.mp4"
        path.write_bytes(media_files.mp4([frame] * self.frames, size=self.size))
        small = media_files.mp4([media_files.jpeg((0, 0, 0))] * 3)
        script = _MEASURED.format(prepare=prepare, load=load, small=small)
        command = [sys.executable, "-c", script, str(path)]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        shape, grown = json.loads(done.stdout.splitlines()[-1])
        width, height = self.shrunk
        assert shape == [self.frames // 2 * (height // 14) * (width // 14), 2 * 3 * 14 * 14]
        return grown


# At full size 50 frames are 1.24 GB. The other two are within the limit of pixels, just and to the
# last of them: 0.9 GB of patches.
CASES = [
    Case(frames=50, size=(3840, 2160), shrunk=(1008, 560), most=400_000_000),
    Case(frames=532, size=(3840, 2160), shrunk=(1008, 560), most=1 << 30),
    Case(frames=768, size=(700, 560), shrunk=(700, 560), most=1 << 30),
]
