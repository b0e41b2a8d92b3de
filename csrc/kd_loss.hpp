// The distillation loss of rows of fp32 logits: the C++ twin of protnest/kernels/kd_loss.py, which holds the contract.
#pragma once

#include <cstdint>

namespace protnest {

// N rows of V logits, contiguous within a row; rows are `stride` elements apart.
struct Rows {
    const float* data;
    std::int64_t stride;
};

// What is kept of each row for its gradient; each points to N numbers. `weight` is the caller's.
struct RowScalars {
    float* student_max;
    float* student_total;
    float* student_total_1;
    float* teacher_max;
    float* teacher_total;
    float* eps;
};

struct KDOptions {
    std::int64_t rows, vocabulary;
    float temperature;
    float smoothing;  // lambda; 0 leaves targets as they are
    bool entropy;     // whether the teacher's entropy is asked for
    int threads;
};

// First row, from 0, in which NaN or an infinity was met; -1 without one.
struct NotFinite {
    std::int64_t student, teacher;
};

// Fills `kept`, and for each row with `soft` or `hard` set KL, cross-entropy and the teacher's entropy; other rows are
// neither read nor written. `labels` are read where `hard` is set.
NotFinite kd_loss_forward(const KDOptions& options, Rows student, Rows teacher, const std::int64_t* labels,
                          const bool* soft, const bool* hard, const RowScalars& kept, float* soft_loss,
                          float* hard_loss, float* entropy);

// Entropy of softmax(row) of every row with `used` set. Returns the first row that is not finite, or -1.
std::int64_t entropies(const KDOptions& options, Rows teacher, const bool* used, float* entropy);

// Writes soft (q - pbar) + hard (softmax - onehot) into `out`, which may be the student's logits; rows whose two
// coefficients are zero become zeros.
void kd_loss_gradient(const KDOptions& options, float* out, std::int64_t out_stride, Rows student, Rows teacher,
                      const std::int64_t* labels, const RowScalars& kept, const float* soft, const float* hard);

}  // namespace protnest
