// What each part of the extension hands to bindings.cpp: a function that adds its bindings to the module.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

void bind_packing(pybind11::module_& module);
void bind_collation(pybind11::module_& module);
void bind_layers(pybind11::module_& module);
void bind_rows(pybind11::module_& module);
void bind_words(pybind11::module_& module);
