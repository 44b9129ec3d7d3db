"""Parameters and forward passes. Knows nothing of data, losses or optimisers."""

from models.common.siblings import require_siblings

require_siblings("kernels")
