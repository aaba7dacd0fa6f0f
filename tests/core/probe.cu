// probe.cu: small kernels that tell a test what a launch did.

struct Pair { int first; float second; };

extern "C" __global__ void __launch_bounds__(256) fill(int* out, int n, int value)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = value + i;
}

// What the launch looked like, by its first thread of every block.
extern "C" __global__ void shape(int* out)   // [blocks, 8]
{
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    if (threadIdx.x + threadIdx.y + threadIdx.z == 0) {
        int* row = out + 8 * block;
        row[0] = gridDim.x, row[1] = gridDim.y, row[2] = gridDim.z;
        row[3] = blockDim.x, row[4] = blockDim.y, row[5] = blockDim.z;
        asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(row[6]));
        asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(row[7]));
    }
}

// Parameters of every width, in an order that needs padding.
extern "C" __global__ void widths(long long* out, char a, double b, short c, Pair d, unsigned char e)
{
    out[0] = a, out[1] = (long long)b, out[2] = c, out[3] = d.first, out[4] = (long long)d.second, out[5] = e;
}

extern "C" __global__ void reverse_shared(int* out)
{
    extern __shared__ int turned[];
    turned[threadIdx.x] = out[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = turned[blockDim.x - 1 - threadIdx.x];
}

extern "C" __global__ void store_far(int* out, long long where) { out[where] = 1; }

extern "C" __global__ void __cluster_dims__(2, 1, 1) in_pairs(int* out) { out[blockIdx.x] = 1; }

extern "C" __global__ void waits(int* out)
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
    out[threadIdx.x] += 1;
}
