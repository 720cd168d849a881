"""Parallel loops on torch's own OpenMP threads.

Two thread pools that both spin make each other wait for milliseconds, so kernels run on the libgomp that torch has
loaded.  A kernel module starts its loops through a data symbol, `__TVMBackendParallelLaunch`; `memcomp_install`
overwrites it with a launcher that comes in the same module, as LLVM text, so no C compiler is needed.  Tasks are
handed out by an atomic counter: uneven tasks (causal attention) even out, and a team of any size does them all.  How
many there are is told beforehand, so that one task wakes nobody; where two callers race for that, only the size of a
team may differ.
The thread count is asked at every call; after a fork the child runs alone, since libgomp's threads do not survive one.
Where no libgomp is loaded, TVM's own pool stays in charge.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from memcomp.codegen import threads
from memcomp.ir.detect import cpu

CHUNKS = 128  # most tasks of a launch

# { GOMP_parallel, thread count, alone }: what the launcher reads at run time
_LLVM = """
@__TVMBackendParallelLaunch = external global ptr
@memcomp_runtime = internal global ptr null
@memcomp_hint = internal global i32 CHUNKS
%job = type { ptr, ptr, i32, i32 }
declare i32 @llvm.smin.i32(i32, i32)
declare i32 @memcomp_worker(ptr)
declare i32 @memcomp_launch(ptr, ptr, i32)

define i32 @memcomp_worker_body(ptr %job) {
entry:
  %env = alloca { ptr, i32 }
  store ptr null, ptr %env
  %count = getelementptr { ptr, i32 }, ptr %env, i32 0, i32 1
  store i32 CHUNKS, ptr %count
  %task = load ptr, ptr %job
  %dataptr = getelementptr %job, ptr %job, i32 0, i32 1
  %data = load ptr, ptr %dataptr
  %next = getelementptr %job, ptr %job, i32 0, i32 2
  %error = getelementptr %job, ptr %job, i32 0, i32 3
  br label %loop
loop:
  %i = atomicrmw add ptr %next, i32 1 monotonic
  %more = icmp slt i32 %i, CHUNKS
  br i1 %more, label %run, label %done
run:
  %code = call i32 %task(i32 %i, ptr %env, ptr %data)
  %bad = icmp ne i32 %code, 0
  br i1 %bad, label %fail, label %loop
fail:
  store atomic i32 %code, ptr %error monotonic, align 4
  br label %loop
done:
  ret i32 0
}

define i32 @memcomp_launch_body(ptr %task, ptr %data) {
entry:
  %job = alloca %job
  store ptr %task, ptr %job
  %dataptr = getelementptr %job, ptr %job, i32 0, i32 1
  store ptr %data, ptr %dataptr
  %next = getelementptr %job, ptr %job, i32 0, i32 2
  store i32 0, ptr %next
  %error = getelementptr %job, ptr %job, i32 0, i32 3
  store i32 0, ptr %error
  %runtime = load ptr, ptr @memcomp_runtime
  %aloneptr = getelementptr ptr, ptr %runtime, i32 2
  %alone = load i64, ptr %aloneptr
  %isalone = icmp ne i64 %alone, 0
  br i1 %isalone, label %serial, label %count
count:
  %threadsptr = getelementptr ptr, ptr %runtime, i32 1
  %threads = load ptr, ptr %threadsptr
  %all = call i32 %threads()
  %hint = load atomic i32, ptr @memcomp_hint monotonic, align 4
  %n = call i32 @llvm.smin.i32(i32 %all, i32 %hint)
  %one = icmp sle i32 %n, 1
  br i1 %one, label %serial, label %parallel
parallel:
  %gomp = load ptr, ptr %runtime
  call void %gomp(ptr @memcomp_worker, ptr %job, i32 %n, i32 0)
  br label %end
serial:
  %x = call i32 @memcomp_worker(ptr %job)
  br label %end
end:
  %result = load i32, ptr %error
  ret i32 %result
}

define i32 @memcomp_tasks(i32 %n) {
  store atomic i32 %n, ptr @memcomp_hint monotonic, align 4
  ret i32 0
}

define i32 @memcomp_install_body(ptr %runtime) {
  store ptr %runtime, ptr @memcomp_runtime
  store ptr @memcomp_launch, ptr @__TVMBackendParallelLaunch
  ret i32 0
}
""".replace("CHUNKS", str(CHUNKS))

# without a launcher nobody asks how many tasks there are
UNTOLD = """
define i32 @memcomp_tasks(i32 %n) {
  ret i32 0
}
"""

# TVM force-inlines imported text, so the functions whose addresses are taken are functions of TVM's.
_SCRIPT = '''
@T.prim_func
def memcomp_worker(job: T.handle) -> T.int32:
    T.func_attr({"global_symbol": "memcomp_worker", "calling_conv": 1})
    T.evaluate(T.call_extern("int32", "memcomp_worker_body", job))

@T.prim_func
def memcomp_launch(task: T.handle, data: T.handle, n: T.int32) -> T.int32:
    T.func_attr({"global_symbol": "memcomp_launch", "calling_conv": 1})
    assert T.call_extern("int32", "memcomp_launch_body", task, data) == 0, "a task of the kernel failed"

@T.prim_func
def memcomp_install(runtime: T.handle):
    T.func_attr({"global_symbol": "memcomp_install"})
    T.evaluate(T.call_extern("int32", "memcomp_install_body", runtime))
'''

_lock = threading.Lock()
_functions: dict[str, Any] = {}


def with_launcher(functions: Mapping[str, Any]) -> Any:
    """A kernel's functions and the launcher's as one module."""
    import tvm
    from tvm import tirx

    from memcomp.codegen.tvm.script import read

    with _lock:
        if not _functions:
            own = read(_SCRIPT, {})
            f = own["memcomp_install"]
            own["memcomp_install"] = f.with_body(
                tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", _LLVM, f.body))
            _functions.update(own)
    return tvm.IRModule({**functions, **_functions})


def install(module: Any) -> bool:
    """Send the parallel loops of a loaded kernel module to torch's threads; False where there is no libgomp."""
    if threads.install(module, load=False):
        return True
    import tvm

    # TVM's own default is half of the logical cores of an x86 machine
    tvm.get_global_func("runtime.config_threadpool")(1, cpu().cores)
    return False
