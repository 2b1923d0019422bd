#include "native.hpp"

void bind_collation(pybind11::module_& module) { (void)module; }
