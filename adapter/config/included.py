"""Merchants in files of their own, which the key `include` names.

Such a file has the key `merchants` in the form of the main file, and no other. So a merchant can be moved from one to
the other without a change; `${file:PATH}` begins at the folder of the main file in both.
"""

import re
from glob import glob
from typing import Any

from adapter.config.model import INCLUDE
from adapter.config.problems import under
from adapter.config.yaml_source import NOTHING, Document

ONLY = "an included file has the key merchants and no other"


def include_merchants(main: Document, tree: dict[str, Any]) -> bool:
    """Add the merchants of all included files to the tree of the main file.

    Args:
        main: The main file, which takes the problems and the places.
        tree: Its tree.

    Returns:
        False if a file cannot be read, so that merchants are missing and checking the rest would report too much.
    """
    pattern = tree.get("include")
    if not isinstance(pattern, str) or not re.search(INCLUDE, pattern):
        return True  # there is none, or its conversion reports it
    folder = main.path.parent
    names = sorted(glob(str(pattern), root_dir=folder))  # unlike `Path.glob`, it leaves hidden files out
    if not names:
        main.report("include", f"matches no file in the folder {folder.absolute()}; add one, or remove this key")
        return False
    merchants = tree.setdefault("merchants", {})
    is_whole = True
    for path in [folder / name for name in names]:
        if path.resolve() == main.path.resolve():
            main.report("include", "matches this file, too; keep the merchants in a folder, such as merchants/*.yaml")
            continue
        included = main.included(path)
        found = included.read()
        is_whole &= found is not NOTHING
        if found is not NOTHING and isinstance(merchants, dict):
            _add_merchants(main, merchants, included, found)
        main.problems += included.problems
    return is_whole


def _add_merchants(main: Document, merchants: dict[str, Any], included: Document, found: dict[str, Any]) -> None:
    for key in found:
        if key != "merchants":
            included.report(under("", key), f"is not a key here; {ONLY}")
    its = found.get("merchants")
    if not isinstance(its, dict) or not its:
        included.report("merchants", "must be a mapping of at least 1 entry: the id of a merchant, and its keys")
        return
    for name, merchant in its.items():
        at = under("merchants", name)
        if name in merchants:
            included.report(at, f"is given twice, first in {main.source.place(at)}")
            continue
        merchants[name] = merchant
        main.source.add(included.source, at)
