// The dtypes of the CUDA kernels, between a .cu file and its glue.
#pragma once

enum class FloatType { f64, f32, bf16, f16 };
