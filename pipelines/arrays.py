"""Arrays of this room by type and shape, which are checked at call time under pytest."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Int32, Int64, UInt8

Picture = UInt8[np.ndarray, "height width 3"]
"""RGB pixels of one frame or image."""
Pixels = UInt8[np.ndarray, "f height width 3"]
"""RGB pixels of frames of one size."""
Runs = UInt8[np.ndarray, "runs temporal height width 3"]
"""Frames in the runs that patches span."""
Blocks = UInt8[np.ndarray, "runs rows columns merge merge 3 temporal patch patch"]
"""Frames cut into blocks of merge x merge patches."""
Coverage = UInt8[np.ndarray, "height width"]
"""How much of each pixel something covers, 255: all of it."""
Greys = Float32[np.ndarray, "height width"]
"""Grey levels."""
Seconds = Float64[np.ndarray, " n"]
"""Times."""
Indices = Int64[np.ndarray, " n"]
"""Places of frames in a video."""
Tokens = Int32[np.ndarray, " t"]
"""Token ids."""
Weights = Float32[np.ndarray, " t"]
"""What each token counts in a loss."""
Marks = Bool[np.ndarray, " t"]
"""Which tokens are of some kind."""
Positions = Int32[np.ndarray, "t 3"]
"""M-RoPE positions: time, height, width."""
Grids = Int32[np.ndarray, "f 2"]
"""Rows and columns of patches of frames."""
Counts = Int[np.ndarray, " f"]
"""A number for each frame."""
