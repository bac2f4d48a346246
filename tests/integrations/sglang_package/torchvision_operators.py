"""For environments in which SGLang is tested on a CPU: torchvision's operators, defined before torchvision looks.

SGLang imports torchvision, whose wheel on package indexes is linked against CUDA: beside a CPU build of torch its
import fails, "operator torchvision::nms does not exist". Nothing calls them, so a definition is enough. To install:

    python tests/integrations/sglang_package/torchvision_operators.py     # with the environment's own python

which copies this file into its site-packages, with a .pth file that imports it whenever python starts.
"""

import importlib.abc
import sys


class Finder(importlib.abc.MetaPathFinder):
    """Finds nothing; sees torchvision being imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].library = library  # an operator lives as long as its library


if __name__ == "__main__":
    import shutil
    import sysconfig
    from pathlib import Path

    site = Path(sysconfig.get_path("purelib"))
    shutil.copy(__file__, site / "torchvision_operators.py")
    (site / "torchvision_operators.pth").write_text("import torchvision_operators\n")
else:
    sys.meta_path.insert(0, Finder())
