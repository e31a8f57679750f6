"""Public functions with the names and semantics of mlx.core, for the modules of this package: `ops.add(a, b)`."""
# ruff: noqa: F401, F403, I001  (array.py comes first: it imports the modules that need it)
from .array import Array
from .creation import *
from .elementwise import *
from .movements import *
from .movements import slice_update, windowed
from .products import *
from .reductions import *
