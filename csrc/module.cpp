// fisherprune._C: what the library of kernels beside it tells about itself, in Python.
// The one file that is compiled for a certain Python; it knows nothing of torch.
#include <pybind11/pybind11.h>

#include "facts.h"

// All is constant: free-threaded Pythons need no lock.
PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  const FisherpruneFacts& facts = *fisherprune_facts();
  m.doc() = "Facts about the compiled kernels of fisherprune.";
  m.attr("cuda_version") = facts.cuda_version;
  m.attr("cuda_archs") = facts.cuda_archs;
  m.attr("torch_version") = facts.torch_version;
  m.attr("source_hash") = facts.source_hash;
  m.attr("compiler") = facts.compiler;
  m.def("cpu_capability", &fisherprune_cpu_capability, "avx512, avx2 or portable");
  m.def("mkl_is_narrow", &fisherprune_mkl_is_narrow,
        "whether MKL's products use half of this processor's vectors");
}
