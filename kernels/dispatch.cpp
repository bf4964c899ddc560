// Which ISA runs: best first, the environment or set_isa() decides otherwise.
#include "common.h"
#include <atomic>
#include <cstdlib>

namespace fastsparse {

const Kernel& Isa::find(Op op, int rows, int cols, Lay lay) const {
    const char* name = op == op_spmm ? "spmm" : op == op_sddmm ? "sddmm" : "both";
    for (int i = 0; i < n_kernels; ++i) {
        const Kernel& k = kernels[i];
        if (k.rows == rows && k.cols == cols && k.lay == lay && !std::strcmp(k.op, name)) return k;
    }
    throw std::logic_error("no " + std::string(name) + " kernel of tile " + std::to_string(rows) + "x" + std::to_string(cols));
}

std::vector<const Isa*> available_isas() {
    std::vector<const Isa*> found;
    for (const Isa* i : {isa_avx512(), isa_avx2(), isa_neon(), isa_scalar()})
        if (i) found.push_back(i);
    return found;
}

static std::string names(const std::vector<const Isa*>& isas) {
    std::string s;
    for (const Isa* i : isas) s += (s.empty() ? "" : ", ") + std::string(i->name);
    return s;
}

static std::atomic<const Isa*> chosen{nullptr};

void set_isa(const std::string& name) {
    const auto all = available_isas();
    for (const Isa* i : all)
        if (name == i->name) { chosen = i; return; }
    throw std::invalid_argument("ISA '" + name + "' is not available on this machine; choose one of: " + names(all));
}

const Isa& current_isa() {
    if (!chosen) chosen = available_isas().front();
    return *chosen.load();
}

}  // namespace fastsparse
