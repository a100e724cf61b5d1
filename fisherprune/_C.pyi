"""What the library of kernels beside this module tells about itself."""

cuda_version: str
cuda_archs: str
torch_version: str
source_hash: str
compiler: str

def cpu_capability() -> str:
    """avx512, avx2 or portable."""

def mkl_is_narrow() -> bool:
    """Whether MKL's products use half of this processor's vectors."""
