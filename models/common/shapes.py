"""Dimension letters and array aliases used by every model.

B batch            T time / query tokens      S keys (tokens in a buffer)
N query heads      K key/value heads          H head dim
D model width      F feed-forward width       V vocabulary
L layers           P patches or tokens        Q point queries
E recurrent width  G blocks of a gate map     J convolution taps
C classes          R width of pre-logits
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

Tokens = Int[Array, "B T"]
Mask = Bool[Array, "B T"]
Activations = Float[Array, "B T D"]
Logits = Float[Array, "B T V"]
# A random key, new style or old.
Key = PRNGKeyArray | UInt32[Array, "2"]

# A pure dict of arrays: what crosses every boundary (checkpoints, converters, sharding rules, optimiser).
Params = dict[str, Any]
FlatParams = Mapping[str, Any]
