"""Speed, from outside: nothing of the maths imports this folder, which can be deleted."""

from prelar_trl.fast.accelerate import accelerate
from prelar_trl.fast.compilation import CompileMode, compile_update
from prelar_trl.fast.cuda_graphs import record_update
from prelar_trl.fast.skipping import skip_on_device
from prelar_trl.fast.tensor_cores import use_tensor_cores

__all__ = [
    "CompileMode",
    "accelerate",
    "compile_update",
    "record_update",
    "skip_on_device",
    "use_tensor_cores",
]
