#include "native.hpp"

void bind_packing(pybind11::module_& module) { (void)module; }
