/* A driver without a GPU: the functions of NVIDIA's that jax-mhc calls. Each can be told to fail, and what the driver
   tells of a GPU can be any number. A function that -D renames is missing. */

#include <stddef.h>
#include <string.h>

enum {
  kInvalidValue = 1,
  kNotInitialized = 3,
  kInvalidContext = 201,
  kMaxSettings = 64,
};

typedef void* Handle;

/* ---- What a test sets and asks. */

static struct {
  const char* name;
  int value;
} settings[kMaxSettings];
static int num_settings;
static int depth;
static int num_launches;
static int is_initialized;

/* A later value of the same name wins; `name` is never freed. */
void fake_set(const char* name, int value) {
  for (int i = 0; i < num_settings; ++i) {
    if (strcmp(settings[i].name, name) == 0) {
      settings[i].value = value;
      return;
    }
  }
  settings[num_settings].name = name;
  settings[num_settings++].value = value;
}

/* How many contexts are on the stack. */
int fake_depth(void) { return depth; }

int fake_num_launches(void) { return num_launches; }

static int get(const char* name, int otherwise) {
  for (int i = 0; i < num_settings; ++i) {
    if (strcmp(settings[i].name, name) == 0) return settings[i].value;
  }
  return otherwise;
}

/* ---- Its answers. */

#define FAIL_IF_TOLD(function)    \
  do {                            \
    int code = get(#function, 0); \
    if (code != 0) return code;   \
  } while (0)
#define NEEDS_INIT(function)                     \
  do {                                           \
    if (!is_initialized) return kNotInitialized; \
    FAIL_IF_TOLD(function);                      \
  } while (0)
#define NEEDS_CONTEXT(function)            \
  do {                                     \
    if (depth < 1) return kInvalidContext; \
    NEEDS_INIT(function);                  \
  } while (0)

int cuDriverGetVersion(int* version) {
  FAIL_IF_TOLD(cuDriverGetVersion);
  *version = get("version", 13000);
  return 0;
}

int cuInit(unsigned flags) {
  FAIL_IF_TOLD(cuInit);
  is_initialized = 1;
  return flags == 0 ? 0 : kInvalidValue;
}

static int text_of(int code, const char** text, const char* known) {
  *text = code < 1000 ? known : NULL;
  return *text ? 0 : kInvalidValue;
}

int cuGetErrorName(int code, const char** text) {
  FAIL_IF_TOLD(cuGetErrorName);
  return text_of(code, text, "CUDA_ERROR_FAKE");
}

int cuGetErrorString(int code, const char** text) {
  FAIL_IF_TOLD(cuGetErrorString);
  return text_of(code, text, "a fake error");
}

int cuDeviceGetCount(int* count) {
  NEEDS_INIT(cuDeviceGetCount);
  *count = get("count", 1);
  return 0;
}

int cuDeviceGetName(char* name, int len, int device) {
  (void)device;
  NEEDS_INIT(cuDeviceGetName);
  if (get("name_without_end", 0)) {
    memset(name, 'x', (size_t)len);
  } else {
    strncpy(name, "Fake GPU", (size_t)len);
  }
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  NEEDS_INIT(cuDeviceGetAttribute);
  switch (attribute) {
    case 16: *value = get("multiprocessors", 132); return 0;
    case 75: *value = get("major", 9); return 0;
    case 76: *value = get("minor", 0); return 0;
    case 97: *value = get("shared_bytes", 232448); return 0;
    default: return kInvalidValue;
  }
}

int cuStreamGetCtx(Handle stream, Handle* context) {
  (void)stream;
  NEEDS_INIT(cuStreamGetCtx);
  *context = &depth;
  return 0;
}

int cuCtxPushCurrent_v2(Handle context) {
  NEEDS_INIT(cuCtxPushCurrent_v2);
  if (context != &depth) return kInvalidContext;
  ++depth;
  return 0;
}

/* As NVIDIA's, it may tell an error of earlier work, and pops nonetheless. */
int cuCtxPopCurrent_v2(Handle* context) {
  if (depth < 1) return kInvalidContext;
  --depth;
  *context = &depth;
  NEEDS_INIT(cuCtxPopCurrent_v2);
  return 0;
}

int cuCtxGetDevice(int* device) {
  NEEDS_CONTEXT(cuCtxGetDevice);
  *device = get("ordinal", 0);
  return 0;
}

int cuLibraryLoadData(Handle* library, const void* code, void* jit_options, void** jit_values,
                      unsigned num_jit_options, void* options, void** values,
                      unsigned num_options) {
  (void)jit_options, (void)jit_values, (void)options, (void)values;
  NEEDS_INIT(cuLibraryLoadData);
  if (!code || num_jit_options || num_options) return kInvalidValue;
  *library = settings;
  return 0;
}

int cuLibraryGetKernel(Handle* kernel, Handle library, const char* name) {
  NEEDS_INIT(cuLibraryGetKernel);
  if (library != settings || strncmp(name, "mhc_", 4) != 0) return kInvalidValue;
  *kernel = &num_launches;
  return 0;
}

int cuKernelGetAttribute(int* value, int attribute, Handle kernel, int device) {
  (void)attribute, (void)device;
  NEEDS_INIT(cuKernelGetAttribute);
  *value = get("static_bytes", 1024);
  return kernel == &num_launches ? 0 : kInvalidValue;
}

int cuKernelSetAttribute(int attribute, int value, Handle kernel, int device) {
  (void)attribute, (void)device;
  NEEDS_INIT(cuKernelSetAttribute);
  return kernel == &num_launches && value >= 0 ? 0 : kInvalidValue;
}

int cuKernelGetFunction(Handle* function, Handle kernel) {
  NEEDS_CONTEXT(cuKernelGetFunction);
  *function = kernel;
  return 0;
}

/* The head of CUlaunchConfig. */
struct Config {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
};

static int is_possible(const struct Config* config, Handle function) {
  const unsigned *grid = config->grid, *block = config->block;
  return function == &num_launches && grid[0] > 0 && grid[0] < 1u << 31 && grid[1] > 0 &&
         grid[1] < 1 << 16 && grid[2] > 0 && grid[2] < 1 << 16 && block[0] > 0 &&
         block[0] <= 1024 && block[1] == 1 && block[2] == 1 &&
         config->shared_bytes <= (unsigned)get("shared_bytes", 232448);
}

int cuOccupancyMaxActiveClusters(int* count, Handle function, const struct Config* config) {
  NEEDS_CONTEXT(cuOccupancyMaxActiveClusters);
  *count = get("clusters", 16);
  return is_possible(config, function) ? 0 : kInvalidValue;
}

int cuTensorMapEncodeTiled(void* map, int dtype, unsigned rank, void* address, const void* sizes,
                           const void* strides, const void* box_sizes, const void* steps,
                           int interleave, int swizzle, int promotion, int fill) {
  (void)dtype, (void)sizes, (void)strides, (void)box_sizes, (void)steps;
  (void)interleave, (void)swizzle, (void)promotion, (void)fill;
  NEEDS_INIT(cuTensorMapEncodeTiled);
  memset(map, 1, 128);
  return rank == 4 && address ? 0 : kInvalidValue;
}

int cuLaunchKernelEx(const struct Config* config, Handle function, void** args, void** extra) {
  NEEDS_CONTEXT(cuLaunchKernelEx);
  if (!args || extra || !is_possible(config, function)) return kInvalidValue;
  ++num_launches;
  return 0;
}
