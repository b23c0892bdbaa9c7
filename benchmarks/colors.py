"""The color of every optimizer in our charts."""

from ds_optim.optimizers.registry import optimizers

_LISTED = ("black", *(f"tab:{one}" for one in ("green", "orange", "purple", "blue", "red", "brown", "pink", "olive")))
COLORS = dict(zip(optimizers(), _LISTED, strict=True))
