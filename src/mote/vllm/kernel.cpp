// The experts of a linear layer, each for the tokens of its own kind; kernel.py says what is what.
//
// Plain loops over vectors of LANES floats. A block of up to ROWS tokens is taken at a time, whose sums stay in
// registers; weights lie in the order in which they are read, and are read once for a block.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {
constexpr int LANES = 16, ROWS = 12;
constexpr int AHEAD = 32;     // vectors of weights that are asked for before they are needed
constexpr int64_t SHARE = 8;  // vectors of outputs that a thread takes at a time
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));

struct Block {  // tokens of one kind
    int64_t begin, rows, kind;
};

Vector load(const float* from) {
    Vector loaded;
    std::memcpy(&loaded, from, sizeof(Vector));
    return loaded;
}

void store(float* to, const Vector& stored) { std::memcpy(to, &stored, sizeof(Vector)); }

// The hidden state of M tokens in N vectors of columns. a: (N, in, LANES), hidden: (N * LANES, M)
template <int M, int N>
void shrink(const float* const* x, int64_t in, const float* a, float* hidden) {
    Vector sums[M][N] = {};
    for (int64_t i = 0; i < in; i++) {
        Vector weights[N];
        for (int n = 0; n < N; n++) {
            weights[n] = load(a + (n * in + i) * LANES);
            __builtin_prefetch(a + (n * in + i + AHEAD) * LANES);
        }
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) sums[m][n] += weights[n] * x[m][i];
    }
    for (int n = 0; n < N; n++)
        for (int c = 0; c < LANES; c++)
            for (int m = 0; m < M; m++) hidden[(n * LANES + c) * M + m] = sums[m][n][c];
}

// Adds to up to LANES outputs of M tokens. b: (columns, LANES), hidden: (columns, M)
template <int M>
void expand(float* const* out, int64_t width, const float* b, int64_t columns, const float* hidden) {
    Vector sums[M] = {};
    for (int64_t c = 0; c < columns; c++) {
        const Vector weights = load(b + c * LANES);
        __builtin_prefetch(b + (c + AHEAD) * LANES);
        for (int m = 0; m < M; m++) sums[m] += weights * hidden[c * M + m];
    }
    for (int m = 0; m < M; m++) {
        if (width == LANES)
            store(out[m], load(out[m]) + sums[m]);
        else
            for (int64_t j = 0; j < width; j++) out[m][j] += sums[m][j];
    }
}

using Shrink = void (*)(const float* const*, int64_t, const float*, float*);
using Expand = void (*)(float* const*, int64_t, const float*, int64_t, const float*);
constexpr Shrink SHRINK[ROWS][2] = {
    {shrink<1, 1>, shrink<1, 2>},   {shrink<2, 1>, shrink<2, 2>},   {shrink<3, 1>, shrink<3, 2>},
    {shrink<4, 1>, shrink<4, 2>},   {shrink<5, 1>, shrink<5, 2>},   {shrink<6, 1>, shrink<6, 2>},
    {shrink<7, 1>, shrink<7, 2>},   {shrink<8, 1>, shrink<8, 2>},   {shrink<9, 1>, shrink<9, 2>},
    {shrink<10, 1>, shrink<10, 2>}, {shrink<11, 1>, shrink<11, 2>}, {shrink<12, 1>, shrink<12, 2>},
};
constexpr Expand EXPAND[ROWS] = {
    expand<1>, expand<2>, expand<3>, expand<4>,  expand<5>,  expand<6>,
    expand<7>, expand<8>, expand<9>, expand<10>, expand<11>, expand<12>,
};

int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }
}  // namespace

extern "C" int64_t mote_lanes() { return LANES; }

// x (T, in), out (T, outputs): rows `rows[starts[k]:starts[k + 1]]` are of kind k, which has `columns[k]` columns in each
// of the parts. A part is `widths` outputs from `begins` on. a: (kinds), b: (kinds, parts).
extern "C" void mote_add(const float* x, int64_t in, float* out, int64_t outputs, const int64_t* rows,
                         const int64_t* starts, int64_t kinds, const int64_t* columns, int64_t parts,
                         const int64_t* begins, const int64_t* widths, const float* const* a, const float* const* b) {
    std::vector<Block> blocks;
    int64_t stride = 0;  // of a token's hidden state
    for (int64_t kind = 0; kind < kinds; kind++) {
        const int64_t begin = starts[kind], count = starts[kind + 1] - begin, number = pieces(count, ROWS);
        if (!count || !columns[kind]) continue;
        stride = std::max(stride, parts * columns[kind]);
        for (int64_t n = 0; n < number; n++) {  // of the same size: a block of one token reads as much as one of eight
            const int64_t from = count * n / number, to = count * (n + 1) / number;
            blocks.push_back({begin + from, to - from, kind});
        }
    }
    if (blocks.empty()) return;
    std::vector<float> hidden(starts[kinds] * stride);
    const int64_t number = blocks.size(), pairs = pieces(stride / LANES, 2);
#pragma omp parallel
    {
#pragma omp for collapse(2)
        for (int64_t n = 0; n < number; n++)
            for (int64_t pair = 0; pair < pairs; pair++) {
                const Block& block = blocks[n];
                const int64_t left = parts * columns[block.kind] / LANES - 2 * pair;
                if (left <= 0) continue;
                const float* inputs[ROWS];
                for (int64_t m = 0; m < block.rows; m++) inputs[m] = x + rows[block.begin + m] * in;
                SHRINK[block.rows - 1][left > 1](inputs, in, a[block.kind] + 2 * pair * in * LANES,
                                                 &hidden[block.begin * stride + 2 * pair * LANES * block.rows]);
            }
        for (int64_t part = 0; part < parts; part++) {
            const int64_t vectors = pieces(widths[part], LANES);
#pragma omp for nowait
            for (int64_t share = 0; share < pieces(vectors, SHARE); share++)
                for (const Block& block : blocks)
                    for (int64_t j = share * SHARE; j < std::min(vectors, (share + 1) * SHARE); j++) {
                        const int64_t own = columns[block.kind], first = begins[part] + j * LANES;
                        float* results[ROWS];
                        for (int64_t m = 0; m < block.rows; m++)
                            results[m] = out + rows[block.begin + m] * outputs + first;
                        EXPAND[block.rows - 1](results, std::min<int64_t>(LANES, widths[part] - j * LANES),
                                               b[block.kind * parts + part] + j * own * LANES, own,
                                               &hidden[block.begin * stride + part * own * block.rows]);
                    }
        }
    }
}
