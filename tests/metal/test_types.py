"""Every text that the encoders hand to Metal's compiler is type-checked; the checker finds what it is there to find."""
import re
from collections.abc import Iterable

import pytest
from typecheck import findings, needed

from lazulite.cli.selftest import MODELS, decode_steps
from lazulite.engine import cpu
from lazulite.engine.errors import UserError
from lazulite.engine.metal import msl, selftest
from lazulite.engine.metal.encoders import encode
from lazulite.engine.metal.steps import Dispatch, Step, Unsupported
from lazulite.engine.metal.vectors import FILES, bind, vectors


def sources(steps: Iterable[tuple[str, Step]]) -> dict[str, dict[str, tuple[str, Dispatch]]]:
    """The different texts that these steps' dispatches compile: for each function a name and the first dispatch."""
    found: dict[str, dict[str, tuple[str, Dispatch]]] = {}
    for name, step in steps:
        try:
            dispatches = encode(step)
        except Unsupported:
            continue                                       # the CPU runs it
        for dispatch in dispatches:
            text = msl.source(dispatch.file, dispatch.defines, dispatch.source)
            fits(name, dispatch, msl.parse(text))
            found.setdefault(text, {}).setdefault(dispatch.function, (name, dispatch))
    return found


def fits(name: str, dispatch: Dispatch, source: msl.Source) -> None:
    """A dispatch gives what its kernel has, in a size that a GPU takes."""
    assert set(dispatch.arguments) <= set(source.kernels[dispatch.function].buffers), name
    assert set(dispatch.constants) <= set(source.constants), name
    width, height, depth = dispatch.threads
    assert width * height * depth <= 1024 and width * height * depth % 32 == 0, name
    assert all(len(v) <= 4096 for v in dispatch.arguments.values() if isinstance(v, bytes)), name


def check_all(steps: Iterable[tuple[str, Step]]) -> None:
    found = []
    for text, functions in sources(steps).items():
        for name, dispatch in functions.values():
            if missing := needed(text, dispatch.function) - set(dispatch.constants):
                found.append(f"{name}: {dispatch.function} needs the function constants {missing}")
        found += [f"{name}: {finding}" for finding in findings(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("file", FILES)
def test_sources_of_vectors_are_well_typed(file: str) -> None:
    steps = [(vector.id, bind(vector)[0]) for vector in vectors(file)]
    assert len({name for name, _ in steps}) == len(steps), "two vectors have one name"
    check_all(steps)


def test_sources_of_real_sizes_are_well_typed() -> None:
    """What the self-test measures, and what decodes a token of models as people have them."""
    cases = [(case.vector.id, bind(case.vector)[0]) for case in selftest.cases(cpu.runtime().opcodes)]
    check_all(cases + [(name, step) for name, config in MODELS.items()
                       for step in decode_steps(config | {"num_hidden_layers": 1})])


HEAD = """#include <metal_stdlib>
using namespace metal;
struct P { int n; float a[4]; };
constant int N [[function_constant(0)]];
inline float first(device const float* p) { return p[0]; }
"""
SIGNATURE = """kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
  constant P& p [[buffer(2)]], device half* h [[buffer(3)]], device bfloat* b [[buffer(4)]], device P* ps [[buffer(5)]],
  uint tid [[thread_position_in_threadgroup]]) {
  threadgroup float part[32];
"""
BODIES = [  # a statement of a kernel, and what is said of it; None: it is right
    ("part[tid] = x[0]; y[tid] = first(x) + part[tid];", None),
    ("float s = float(b[0]) + float(h[0]); b[1] = bfloat(s); h[1] = half(s); b[2] = b[3];", None),
    ("uint u = as_type<uint>(x[0]); y[0] = float2(1.0f, 2.0f).y + float(u) + float(p.n) + p.a[1];", None),
    ("y[0] = simd_sum(x[0]) + float(simd_sum(tid)); threadgroup_barrier(mem_flags::mem_threadgroup);", None),
    ("simdgroup_float8x8 m = make_filled_simdgroup_matrix<float, 8>(0.0f); simdgroup_load(m, part, 8);", None),
    ("thread float* t = y;", "cannot initialize"),
    ("auto t = (threadgroup float*)y;", "mismatching address spaces"),
    ("y[0] = first(part);", "no matching function"),
    ("y[0] = first(y + 1) + first(&p.a[0]);", "no matching function"),
    ("float* t = y;", "without an address space"),
    ("const float& t = y[0];", "without an address space"),
    ("x[0] = 1.0f;", "not assignable"),
    ("P q = p;", "no matching constructor"),
    ("P q = ps[0];", "copied from another address space"),
    ("P q; q.n = 1; ps[0] = q;", "copied from another address space"),
    ("half4 a = half4(1.0h); float4 c = a;", "cannot initialize"),
    ("half4 a = half4(1.0h); a = a * 2.0f;", "greater rank"),
    ("float4 a = float4(1.0f, 2.0f);", "wrong number of components"),
    ("y[0] = max(h[0], 1.0f);", "ambiguous"),
    ("y[0] = float(min(tid, 3));", "ambiguous"),
    ("y[0] = exp(p.n);", "ambiguous"),
    ("h[0] = h[1] * h[2];", "arithmetic in half"),
    ("y[0] = simd_sum(b[0]);", "deleted function"),
    ("y[0] = exp(b[0]);", "deleted function"),
    ("b[0] = x[0];", "no viable overloaded '='"),
    ("y[0] = float(simd_sum(ulong(tid)));", "ambiguous"),
    ("y[0] = float(simd_sum(tid > 3u));", "deleted function"),
    ("y[0] = erf(x[0]);", "undeclared identifier 'erf'"),
    ("y[0] = expm1(x[0]);", "undeclared identifier 'expm1'"),
    ("double d = 1.0f;", "type 'double'"),
    ("y[0] = x[0] * 2.0;", "double precision constant"),
    ("float a[N]; a[0] = 1.0f;", "not a constant expression"),
    ("threadgroup float z = 1.0f;", "cannot have an initializer"),
    ("for (int i = 0; i < 4; i++) { threadgroup float z[4]; z[0] = 0.0f; }", "outermost scope"),
    ("threadgroup_barrier();", "no matching function"),
    ("y[0] = as_type<float>(h[0]);", "different sizes"),
    ("float z; if (tid > 3u) z = 1.0f; y[0] = z;", "uninitialized"),
    ("float a[4]; a[4] = 1.0f;", "past the end"),
    ("if constexpr (sizeof(p) > 4) y[0] = 1.0f;", "C++ standards before C++17"),
    ("static int s = 3;", "static"),
    ("goto end; end: y[0] = 1.0f;", "goto"),
    ("auto f = [](float v) { return v; }; y[0] = f(1.0f);", "lambdas"),
    ("int thread* q = new int(3);", "new"),
    ("simdgroup_float8x8 m; simdgroup_half8x8 n; simdgroup_multiply_accumulate(m, n, n, m);", "no matching function"),
    ("simdgroup_float8x8 m; simdgroup_load(m, p.a, 8);", "no matching function"),
    ("simdgroup_float8x8 m; simdgroup_load(m, h, 8);", "no matching function"),
    ("atomic_fetch_add_explicit(y, 1.0f, memory_order_relaxed);", "no matching function"),
]
TOPS = [  # a declaration outside of the kernel
    ("inline float f(const float* q) { return q[0]; }", "without an address space"),
    ("template <class T> inline float f(const T* q) { return float(q[0]); }", "without an address space"),
    ("template <class T> inline float f(device const T* q, thread T& r) { auto s = q; return float(s[0]); }", None),
    ("inline void f() { threadgroup float z[4]; z[0] = 0.0f; }", "cannot be declared in local address space"),
    ("int f(int n); int g(int n) { return f(n); } int f(int n) { return n > 0 ? g(n - 1) : 0; }", "calls itself"),
    ("struct Q { virtual int f(); };", "virtual"),
    ("inline float f(float (*g)(float)) { return g(1.0f); }", "function"),
    ("float shared = 1.0f;", "constant address space"),
    ("inline float matrix(float x) { return x; } inline float f(float x) { return matrix(x); }", "ambiguous"),
    ("inline float fragment(float x) { return x; }", "poisoned"),              # a keyword of Metal
    ("kernel int k2(device float* y [[buffer(0)]]) { return 0; }", "void return type"),
    ("kernel void k2(float* y [[buffer(0)]]) { y[0] = 1.0f; }", "pointer arguments to kernel functions"),
]


@pytest.mark.parametrize(("statement", "why"), BODIES, ids=[body for body, _ in BODIES])
def test_mistake_in_a_kernel_is_found(statement: str, why: str | None) -> None:
    line = HEAD.count("\n") + SIGNATURE.count("\n") + 1
    check(findings(f"{HEAD}{SIGNATURE}{statement}\n}}\n"), line, statement, why)


@pytest.mark.parametrize(("declaration", "why"), TOPS, ids=[top for top, _ in TOPS])
def test_mistake_outside_is_found(declaration: str, why: str | None) -> None:
    check(findings(f"{HEAD}{declaration}\n"), HEAD.count("\n") + 1, declaration, why)


def check(found: list[str], line: int, text: str, why: str | None) -> None:
    """The line is named with its reason, and no other line is."""
    assert {int(finding.partition(":")[0]) for finding in found} == ({line} if why else set()), found
    assert why is None or any(why in finding.removeprefix(f"{line}: {text}") for finding in found), found


def test_function_constants_that_a_kernel_needs() -> None:
    text = HEAD + """constant bool UNUSED [[function_constant(1)]];
inline float factor() { return float(N); }
template <int M> inline float twice() { return M * factor(); }
kernel void a(device float* y [[buffer(0)]]) { y[0] = twice<2>(); }
kernel void b(device float* y [[buffer(0)]]) { y[0] = 1.0f; }
"""
    assert needed(text, "a") == {"N"} and needed(text, "b") == set() and findings(text) == []


ARGUMENTS = [  # of a kernel, and what is said of them
    ("device float* y [[buffer(31)]]", "buffer index 31"),
    ("device float* y [[buffer(0)]], device float* z [[buffer(0)]]", "share a buffer index"),
    ("float y [[buffer(0)]]", "has type float"),
    ("device float* y", "has no attribute"),
    ("uint4 i [[thread_position_in_grid]]", "has type uint4"),
    ("float i [[thread_index_in_threadgroup]]", "has type float"),
    ("uint2 i [[thread_index_in_simdgroup]]", "has type uint2"),
    ("uint i [[thread_position_in_grid]], uint3 j [[threads_per_threadgroup]]", "different widths"),
    ("uint i [[thread_index]]", "attribute thread_index"),
]


@pytest.mark.parametrize(("arguments", "why"), ARGUMENTS, ids=[arguments for arguments, _ in ARGUMENTS])
def test_wrong_signature_is_refused(arguments: str, why: str) -> None:
    with pytest.raises(UserError, match=re.escape(why)):
        msl.parse(f"kernel void k({arguments}) {{}}")
