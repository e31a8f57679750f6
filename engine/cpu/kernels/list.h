// Every kernel of the runtime, one line each: LZ_KERNEL(name), and the file that defines it (CMakeLists.txt reads it
// here). LZ_KERNEL_AMX(name) where the file also has code for AMX tiles.
#ifndef LZ_KERNEL_AMX
#define LZ_KERNEL_AMX LZ_KERNEL
#endif
LZ_KERNEL(elementwise)        // elementwise.cpp
LZ_KERNEL_AMX(linear)         // linear.cpp
LZ_KERNEL_AMX(experts)        // linear.cpp
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
LZ_KERNEL_AMX(matmul)         // matmul.cpp
LZ_KERNEL_AMX(add_product)    // matmul.cpp
LZ_KERNEL_AMX(quantized_matmul) // quantized_matmul.cpp
LZ_KERNEL_AMX(linear_cross_entropy) // linear_cross_entropy.cpp
LZ_KERNEL(quantize)           // quantize.cpp
LZ_KERNEL(dequantize)         // quantize.cpp
LZ_KERNEL(random)             // random.cpp
LZ_KERNEL(host)               // host.cpp
LZ_KERNEL(scatter)            // scatter.cpp
LZ_KERNEL(take_along)         // scatter.cpp
LZ_KERNEL(softmax_grad)       // gradients.cpp
LZ_KERNEL(rms_norm_grad)      // gradients.cpp
LZ_KERNEL(layer_norm_grad)    // gradients.cpp
LZ_KERNEL(cross_entropy_lse)  // cross_entropy.cpp
LZ_KERNEL(cross_entropy_grad) // cross_entropy.cpp
LZ_KERNEL(attention_lse)      // attention_dense.cpp
LZ_KERNEL(attention_grad)     // attention_dense.cpp
LZ_KERNEL(ragged_attention_lse)  // attention_dense.cpp
LZ_KERNEL(ragged_attention_grad) // attention_dense.cpp
LZ_KERNEL(sort)               // sort.cpp
LZ_KERNEL(argsort)            // sort.cpp
LZ_KERNEL(scan)               // scan.cpp
LZ_KERNEL(conv)               // conv.cpp
LZ_KERNEL(gather_mm)          // grouped.cpp
LZ_KERNEL(short_conv)         // delta.cpp
LZ_KERNEL(gated_delta)        // delta.cpp
