"""Peak memory of a front end that prepares a small file of large frames, in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.integrations import media_files

__all__ = ["CASES", "file_of_large_frames", "grown_by"]

SIZE = (3840, 2160)
# Frames, and the bytes that a process may grow by. At full size 50 are 1.24 GB. Of 532, just within
# the limit of pixels, the shrunk frames are 0.9 GB and their patches as much; in fp32 these alone
# were 3.6 GB.
CASES = [(50, 1 << 30), (532, 2_300_000_000)]
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


def file_of_large_frames(folder: Path, frames: int) -> Path:
    """An MP4 of frames of `SIZE`, one a second."""
    frame = media_files.jpeg((9, 99, 200), size=SIZE)
    path = folder / "large.mp4"
    path.write_bytes(media_files.mp4([frame] * frames, size=SIZE))
    return path


def grown_by(path: Path, *, frames: int, prepare: str, load: str) -> int:
    """Bytes by which the process grew, at most, while it made the patches of a file's frames.

    Parameters
    ----------
    frames : of the file
    prepare : statements before the measurement, imports above all
    load : name of a function of a file's bytes that returns patches [patches, values]
    """
    small = media_files.mp4([media_files.jpeg((0, 0, 0))] * 3)
    script = _MEASURED.format(prepare=prepare, load=load, small=small)
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    shape, grown = json.loads(done.stdout.splitlines()[-1])
    # pairs of frames of 1008x560 in patches of 14x14
    assert shape == [frames // 2 * 72 * 40, 2 * 3 * 14 * 14]
    return grown
