// The module fastalign._native: no logic of its own, each part binds itself.
#include "native.hpp"

PYBIND11_MODULE(_native, module) {
    module.doc() = "Packing, collation, word-wise encoding and CPU kernels of fastalign.";
    bind_packing(module);
    bind_collation(module);
    bind_layers(module);
    bind_rows(module);
    bind_words(module);
}
