#include "native.hpp"

void bind_rows(pybind11::module_& module) { (void)module; }
