// Loads a checkpoint through the C API and prints what is in it.
use std::ffi::{c_char, c_void, CStr, CString};
use std::{mem, ptr, slice};

#[repr(C)]
struct Tensor {
    struct_size: usize,
    name: *const u8,
    name_bytes: usize,
    dtype_name: *const c_char,
    dtype: i32,
    element_bytes: u32,
    shape: *const i64,
    dims: usize,
    file: usize,
    offset_bytes: u64,
    size_bytes: u64,
}

#[repr(C)]
struct LoadRequest {
    struct_size: usize,
    checkpoint: *const c_void,
    paths: *const *const c_char,
    path_count: usize,
    fds: *const i32,
    open_files: *const *const c_void,
    extents: *const c_void,
    extent_count: usize,
    cache: i32,
    verify: i32,
    drop_cached: i32,
    report_extents: i32,
    stream: *mut c_void,
    timeout_ns: i64,
    events: *mut c_void,
    tag: u64,
}

type Handle = *mut c_void;

#[link(name = "flashpack")]
extern "C" {
    fn flashpack_error_message(error: Handle) -> *const c_char;
    fn flashpack_engine_create(options: *const c_void, engine: *mut Handle, error: *mut Handle) -> i32;
    fn flashpack_engine_destroy(engine: Handle);
    fn flashpack_checkpoint_open(path: *const c_char, checkpoint: *mut Handle, error: *mut Handle) -> i32;
    fn flashpack_checkpoint_get_tensor(checkpoint: Handle, i: usize, tensor: *mut Tensor, error: *mut Handle) -> i32;
    fn flashpack_checkpoint_destroy(checkpoint: Handle);
    fn flashpack_load_all(engine: Handle, request: *const LoadRequest, tensors: *mut Handle, error: *mut Handle) -> i32;
    fn flashpack_tensors_data(tensors: Handle, i: usize, data: *mut *mut u8, error: *mut Handle) -> i32;
    fn flashpack_tensors_destroy(tensors: Handle);
}

unsafe fn text<'a>(from: *const c_char) -> &'a str {
    CStr::from_ptr(from).to_str().unwrap()
}

unsafe fn made<T: Copy>(start: T, call: impl FnOnce(*mut T, *mut Handle) -> i32) -> T {
    let (mut result, mut error) = (start, ptr::null_mut());
    assert_eq!(call(&mut result, &mut error), 0, "{}", text(flashpack_error_message(error)));
    result
}

fn main() {
    let path = CString::new(std::env::args().nth(1).unwrap()).unwrap();
    unsafe {
        let null: Handle = ptr::null_mut();
        let engine = made(null, |to, error| flashpack_engine_create(ptr::null(), to, error));
        let checkpoint = made(null, |to, error| flashpack_checkpoint_open(path.as_ptr(), to, error));
        let mut request: LoadRequest = mem::zeroed();
        request.struct_size = mem::size_of::<LoadRequest>();
        request.checkpoint = checkpoint;
        let tensors = made(null, |to, error| flashpack_load_all(engine, &request, to, error));
        let mut error = null;
        for i in 0.. {
            let mut tensor: Tensor = mem::zeroed();
            tensor.struct_size = mem::size_of::<Tensor>();
            if flashpack_checkpoint_get_tensor(checkpoint, i, &mut tensor, &mut error) != 0 {
                break;
            }
            let data = made(ptr::null_mut(), |to, error| flashpack_tensors_data(tensors, i, to, error));
            let name = std::str::from_utf8(slice::from_raw_parts(tensor.name, tensor.name_bytes)).unwrap();
            let shape = slice::from_raw_parts(tensor.shape, tensor.dims);
            let bytes = slice::from_raw_parts(data, tensor.size_bytes as usize);
            println!("{name}: {} {shape:?}, {} bytes", text(tensor.dtype_name), bytes.len());
        }
        flashpack_tensors_destroy(tensors);
        flashpack_checkpoint_destroy(checkpoint);
        flashpack_engine_destroy(engine);
    }
}
