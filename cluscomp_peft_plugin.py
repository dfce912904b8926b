"""Has PEFT and transformers know ClusComp in every process of this Python, whether it imports the package or not.

`cluscomp_peft_plugin.pth`, which Python reads at its start, imports this file. Nothing else is imported until PEFT, or
the part of transformers that knows formats of checkpoints, is: without this package that loads a compressed checkpoint
as a model of random weights, with a warning.
"""

import sys

__all__ = ["NAMES", "Waiting", "install"]

NAMES = ("peft", "transformers.quantizers.auto")  # as `registration.py` has them


class Waiting:
    """A finder of modules that imports `cluscomp_peft` when one of `NAMES` is about to be imported, and finds none."""

    def find_spec(self, name, path=None, target=None):
        if name not in NAMES or self not in sys.meta_path or sys.modules.get("cluscomp_peft") is not None:
            return None  # whoever imported the package has its own finder
        sys.meta_path.remove(self)
        try:
            import cluscomp_peft  # noqa: F401  (importing registers)
        except Exception as error:
            import warnings

            warnings.warn(
                f"cluscomp_peft cannot be imported ({error!r}), so its models cannot be loaded", stacklevel=2
            )
        # The list of finders has changed while it is gone through: what comes of it is found here.
        found = (finder.find_spec(name, path, target) for finder in list(sys.meta_path))
        return next((spec for spec in found if spec is not None), None)


def install():
    """Puts the finder before all others; calling it again does nothing."""
    if not any(isinstance(finder, Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, Waiting())


install()
