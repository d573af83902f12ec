"""faiss, by which k-NN and k-means search: whatever needs neither runs without it."""

from types import ModuleType

from utils.runtime.errors import InputError


def load(user: str, *, otherwise: str = "") -> ModuleType:
    """The library; InputError where it cannot be imported.

    user: what needs it; otherwise: what the message offers instead.
    """
    try:
        import faiss
    except Exception as error:  # one that does not fit what else is installed can raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"faiss: cannot be imported ({reason}), and {user} needs it: pip install faiss-cpu "
            f"(or faiss-gpu){otherwise}"
        ) from error
    return faiss


def version() -> str:
    """Its version, "none" where it is not there."""
    try:
        return load("").__version__
    except InputError:
        return "none"


def has_gpu(faiss: ModuleType) -> bool:
    """Whether this faiss is one for GPUs, and there is one."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
