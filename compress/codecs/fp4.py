"""bitsandbytes' FP4: sign, two exponent bits and one mantissa bit, in the 64-column blocks of NF4."""

from __future__ import annotations

import torch

from compress.codecs.nf4 import FourBit

# In twelfths, in the order of the bit patterns; the bias is 2 and the sign bit of zero is kept.
TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
TABLE = torch.tensor([*TWELFTHS, *(-value for value in TWELFTHS)]) / 12

CODEC = FourBit("fp4", TABLE, nested=False)
DOUBLE_QUANTIZED = FourBit("fp4-dq", TABLE, nested=True)
