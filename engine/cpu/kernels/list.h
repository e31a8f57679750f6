// Every kernel of the runtime, one line each: LZ_KERNEL(name), and the file that defines it (CMakeLists.txt reads it
// here). LZ_KERNEL_AMX(name) where the file also has code for AMX tiles.
#ifndef LZ_KERNEL_AMX
#define LZ_KERNEL_AMX LZ_KERNEL
#endif
LZ_KERNEL(elementwise)        // elementwise.cpp
LZ_KERNEL_AMX(linear)         // linear.cpp
LZ_KERNEL(rope)               // rope.cpp
LZ_KERNEL(rope_append)        // rope.cpp
LZ_KERNEL_AMX(paged_attention) // attention.cpp
LZ_KERNEL(sample)             // sample.cpp
LZ_KERNEL(reduce)             // reduce.cpp
LZ_KERNEL(take)               // gather.cpp
LZ_KERNEL(quantized_take)     // gather.cpp
LZ_KERNEL(softmax)            // norm.cpp
LZ_KERNEL(rms_norm)           // norm.cpp
LZ_KERNEL(layer_norm)         // norm.cpp
LZ_KERNEL(matmul)             // matmul.cpp
LZ_KERNEL(quantize)           // quantize.cpp
LZ_KERNEL(dequantize)         // quantize.cpp
