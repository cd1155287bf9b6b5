// Placeholder until the tiled kernels land.
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>
#include "cpu/launch.h"
#include "schedule.h"
namespace mixed_attention::cpu {
namespace {
template <class T, class P> T* at(P* p, Strides s, int64_t b, int64_t n, int64_t h) { return (T*)p + b*s.batch + n*s.row + h*s.head; }
template <class T> void fwd(const FwdParams& p) {
  for (int64_t b=0;b<p.batch_size;++b) for (int64_t h=0;h<p.num_heads;++h) for (auto& seg : p.schedule->query_segments) for (int64_t i=seg.rows.begin;i<seg.rows.end;++i) {
    const T* q = at<const T>(p.q,p.q_strides,b,i,h);
    double m=-INFINITY; std::vector<double> s; std::vector<int64_t> idx;
    for (auto r: seg.keys) for (int64_t j=r.begin;j<r.end;++j) { if (p.key_padding_mask && !p.key_padding_mask[b*p.key_padding_mask_batch_stride+j]) continue;
      const T* k=at<const T>(p.k,p.k_strides,b,j,h); double a=0; for (int d=0;d<p.head_dim;++d) a+=double(q[d])*k[d]; a*=p.softmax_scale; s.push_back(a); idx.push_back(j); if (a>m) m=a; }
    double l=0; std::vector<double> o(p.head_dim_v,0);
    for (size_t x=0;x<s.size();++x) { double e=std::exp(s[x]-m); l+=e; const T* v=at<const T>(p.v,p.v_strides,b,idx[x],h); for (int d=0;d<p.head_dim_v;++d) o[d]+=e*v[d]; }
    T* out=at<T>(p.out,p.out_strides,b,i,h); for (int d=0;d<p.head_dim_v;++d) out[d]= s.empty()?0:o[d]/l;
    ((T*)p.lse)[(b*p.num_heads+h)*p.seqlen_q+i] = s.empty()?-INFINITY:m+std::log(l);
  }
}
template <class T> void bwd(const BwdParams& p) {
  for (int64_t b=0;b<p.batch_size;++b) for (int64_t h=0;h<p.num_heads;++h) {
    for (int64_t i=0;i<p.seqlen_q;++i) for (int d=0;d<p.head_dim;++d) at<T>(p.dq,p.dq_strides,b,i,h)[d]=0;
    for (int64_t i=0;i<p.seqlen_k;++i) { for (int d=0;d<p.head_dim;++d) at<T>(p.dk,p.dk_strides,b,i,h)[d]=0; for (int d=0;d<p.head_dim_v;++d) at<T>(p.dv,p.dv_strides,b,i,h)[d]=0; }
    for (auto& seg : p.schedule->query_segments) for (int64_t i=seg.rows.begin;i<seg.rows.end;++i) {
    const T* q = at<const T>(p.q,p.q_strides,b,i,h); const T* g=at<const T>(p.dout,p.dout_strides,b,i,h); const T* o=at<const T>(p.out,p.out_strides,b,i,h);
    int64_t li=(b*p.num_heads+h)*p.seqlen_q+i; double lse=((const T*)p.lse)[li]; double delta= p.dlse? -((const T*)p.dlse)[li]:0; for (int d=0;d<p.head_dim_v;++d) delta+=double(g[d])*o[d];
    for (auto r: seg.keys) for (int64_t j=r.begin;j<r.end;++j) { if (p.key_padding_mask && !p.key_padding_mask[b*p.key_padding_mask_batch_stride+j]) continue;
      const T* k=at<const T>(p.k,p.k_strides,b,j,h); const T* v=at<const T>(p.v,p.v_strides,b,j,h); double a=0; for (int d=0;d<p.head_dim;++d) a+=double(q[d])*k[d];
      double e=std::exp(a*p.softmax_scale-lse), dp=0; for (int d=0;d<p.head_dim_v;++d) { dp+=double(g[d])*v[d]; at<T>(p.dv,p.dv_strides,b,j,h)[d]+=e*g[d]; }
      double ds=e*(dp-delta)*p.softmax_scale; for (int d=0;d<p.head_dim;++d) { at<T>(p.dq,p.dq_strides,b,i,h)[d]+=ds*k[d]; at<T>(p.dk,p.dk_strides,b,j,h)[d]+=ds*q[d]; } }
    } }
}
template <class T> void rope(const RopeParams& p) {
  for (int64_t b=0;b<p.batch_size;++b) for (int64_t n=0;n<p.seqlen;++n) for (int64_t h=0;h<p.num_heads;++h) { const T* f=(const T*)p.freqs+b*p.freqs_batch_stride+n*p.freqs_row_stride; const T* x=at<const T>(p.x,p.x_strides,b,n,h); T* o=at<T>(p.out,p.out_strides,b,n,h);
    for (int d=0;d<p.head_dim/2;++d) { T c=f[2*d], s=p.conjugate?-f[2*d+1]:f[2*d+1], a=x[2*d], e=x[2*d+1]; o[2*d]=a*c-e*s; o[2*d+1]=a*s+e*c; } }
}
}
void run_fwd(const FwdParams& p) { if (p.dropout_p>0) throw std::runtime_error("no dropout yet"); if (p.dtype==DType::kFloat32) fwd<float>(p); else if (p.dtype==DType::kFloat64) fwd<double>(p); else throw std::runtime_error("16 bit not yet"); }
void run_bwd(const BwdParams& p) { if (p.dtype==DType::kFloat32) bwd<float>(p); else if (p.dtype==DType::kFloat64) bwd<double>(p); else throw std::runtime_error("16 bit not yet"); }
void run_rope(const RopeParams& p) { if (p.dtype==DType::kFloat32) rope<float>(p); else if (p.dtype==DType::kFloat64) rope<double>(p); else throw std::runtime_error("16 bit not yet"); }
const char* instruction_set() { return "naive"; }
}
