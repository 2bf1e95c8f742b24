"""Let a torchvision that was built for CUDA be imported beside a CPU build of torch.

Package indexes other than PyTorch's own carry torchvision as a CUDA build only. Beside a CPU build
of torch its C++ extension finds no CUDA libraries and stays unloaded. torchvision accepts that,
until ``torchvision._meta_registrations`` attaches shape functions to ``torchvision::nms`` and
``torchvision::qnms``, whose schemas only the extension declares: the import then ends with
``RuntimeError: operator torchvision::nms does not exist``. transformers needs torchvision for its
image processors, so vLLM does not even start.

`declare_missing_ops` declares those two schemas, without any implementation, in the one moment
when it is known that they are missing: after torchvision has tried to load its extension and
before it needs the schemas. A torchvision whose extension loads has both schemas by then and is
left untouched. Resizing and everything else that is plain torch works; a call of ``nms`` itself
still fails with torchvision's own message about its missing operators.

vLLM's API server imports transformers before it loads any plugin, so the hook has to be in place
when the interpreter starts:

    python -P -m m3_plugin.host.torchvision_ops --install      # into the environment of this python
    python -P -m m3_plugin.host.torchvision_ops --remove

The installer writes a ``.pth`` file and a copy of this module, which imports nothing but ``sys``
when python starts. To be deleted when a torchvision that matches CPU torch is to be had from the
index in use, or when torchvision registers these two only if its extension is loaded, as it
already does for its other operators.
"""

import sys

__all__ = ["declare_missing_ops", "install", "remove"]

_NEEDS_SCHEMAS = "torchvision._meta_registrations"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPS = ("nms", "qnms")
_COPY = "_m3_torchvision_ops"
_PTH = "m3_torchvision_ops.pth"

# A torch.library.Library withdraws its declarations when it is collected.
_libraries = []


def declare_missing_ops() -> None:
    """Arrange that importing torchvision succeeds even if its C++ extension cannot be loaded.

    Cheap and idempotent; imports neither torch nor torchvision, and does nothing where torchvision
    is absent or already imported. May be called again after an import of torchvision has failed.
    """
    if _NEEDS_SCHEMAS in sys.modules:
        return
    # By name, because the installed copy of this module has a class of its own.
    if not any(type(finder).__name__ == _DeclareBeforeUse.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeclareBeforeUse())


class _DeclareBeforeUse:
    """Import hook that finds no module; it uses the moment at which torchvision asks for one."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name != _NEEDS_SCHEMAS:
            return
        import torch
        import torchvision.extension  # noqa: F401  (the attempt to load the extension)

        missing = [op for op in _OPS if not hasattr(torch.ops.torchvision, op)]
        if missing:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for op in missing:
                library.define(op + _SCHEMA)
            _libraries.append(library)


def install(directory: str | None = None) -> list[str]:
    """Make every start of this python call `declare_missing_ops`; returns the files written.

    `directory` is a site-packages folder, by default the one of the running interpreter.
    """
    from pathlib import Path

    copy, pth = hook_files(directory)
    copy.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    pth.write_text(f"import {_COPY}; {_COPY}.declare_missing_ops()\n", encoding="utf-8")
    return [str(copy), str(pth)]


def remove(directory: str | None = None) -> list[str]:
    """Undo `install`; returns the files that were there."""
    # The .pth first: without its module it would complain at every start.
    removed = [file for file in reversed(hook_files(directory)) if file.exists()]
    for file in removed:
        file.unlink()
    return [str(file) for file in removed]


def hook_files(directory: str | None = None):
    """The module and the .pth that `install` writes, whether they are there or not."""
    import sysconfig
    from pathlib import Path

    folder = Path(directory or sysconfig.get_path("purelib"))
    return folder / f"{_COPY}.py", folder / _PTH


def _main() -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="python -P -m m3_plugin.host.torchvision_ops")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--install", action="store_true", help="hook into every start of python")
    action.add_argument("--remove", action="store_true", help="take the hook out again")
    verb, files = ("wrote", install()) if parser.parse_args().install else ("removed", remove())
    sys.stdout.writelines(f"{verb} {file}\n" for file in files)


if __name__ == "__main__":
    _main()
