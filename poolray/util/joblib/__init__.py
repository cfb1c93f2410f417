"""joblib, and with it scikit-learn, on poolray: `register()`, then `parallel_backend("poolray")`.

What: makes the backend known to joblib.
Who calls it: user code.
May touch: joblib's table of backends. joblib is imported when a function here is called
(`pip install poolray[joblib]`).
Invariants: nothing changes for programs that name no backend.
"""

from __future__ import annotations

from poolray.util.joblib.registration import register, register_ray

__all__ = ["register", "register_ray"]
