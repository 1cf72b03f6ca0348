/* What docs/examples/c_api/greedy.c needs of onnxruntime's header, to compile it in a test.
 *
 * The wheel has the library, but not the header. The C API is a table of functions that only ever
 * grows at its end, so their places are fixed; the comments count them. Use onnxruntime's own header
 * for anything else.
 */
#ifndef ONNXRUNTIME_C_API_H
#define ONNXRUNTIME_C_API_H
#include <stddef.h>
#include <stdint.h>

#define ORT_API_VERSION 16

typedef struct OrtAllocator OrtAllocator;
typedef struct OrtEnv OrtEnv;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtStatus OrtStatus;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtTypeInfo OrtTypeInfo;
typedef struct OrtValue OrtValue;

typedef enum { ORT_LOGGING_LEVEL_ERROR = 3 } OrtLoggingLevel;
typedef enum OrtAllocatorType { OrtArenaAllocator = 1 } OrtAllocatorType;
typedef enum OrtMemType { OrtMemTypeDefault = 0 } OrtMemType;
typedef enum {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7
} ONNXTensorElementDataType;

typedef struct OrtApi {
    void *from_0[2];
    const char *(*GetErrorMessage)(const OrtStatus *); /* 2 */
    OrtStatus *(*CreateEnv)(OrtLoggingLevel, const char *, OrtEnv **);
    void *from_4[3];
    OrtStatus *(*CreateSession)(const OrtEnv *, const char *, const OrtSessionOptions *,
                                OrtSession **); /* 7 */
    void *from_8[1];
    OrtStatus *(*Run)(OrtSession *, const OrtRunOptions *, const char *const *,
                      const OrtValue *const *, size_t, const char *const *, size_t,
                      OrtValue **); /* 9 */
    OrtStatus *(*CreateSessionOptions)(OrtSessionOptions **);
    void *from_11[19];
    OrtStatus *(*SessionGetInputCount)(const OrtSession *, size_t *); /* 30 */
    void *from_31[2];
    OrtStatus *(*SessionGetInputTypeInfo)(const OrtSession *, size_t, OrtTypeInfo **); /* 33 */
    void *from_34[2];
    OrtStatus *(*SessionGetInputName)(const OrtSession *, size_t, OrtAllocator *,
                                      char **); /* 36 */
    void *from_37[12];
    OrtStatus *(*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo *, void *, size_t,
                                                 const int64_t *, size_t,
                                                 ONNXTensorElementDataType, OrtValue **); /* 49 */
    void *from_50[1];
    OrtStatus *(*GetTensorMutableData)(OrtValue *, void **); /* 51 */
    void *from_52[3];
    OrtStatus *(*CastTypeInfoToTensorInfo)(const OrtTypeInfo *,
                                           const OrtTensorTypeAndShapeInfo **); /* 55 */
    void *from_56[6];
    OrtStatus *(*GetDimensions)(const OrtTensorTypeAndShapeInfo *, int64_t *, size_t); /* 62 */
    void *from_63[2];
    OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *, OrtTensorTypeAndShapeInfo **); /* 65 */
    void *from_66[3];
    OrtStatus *(*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo **); /* 69 */
    void *from_70[6];
    OrtStatus *(*AllocatorFree)(OrtAllocator *, void *); /* 76 */
    void *from_77[1];
    OrtStatus *(*GetAllocatorWithDefaultOptions)(OrtAllocator **); /* 78 */
    void *from_79[13];
    void (*ReleaseEnv)(OrtEnv *); /* 92 */
    void (*ReleaseStatus)(OrtStatus *);
    void (*ReleaseMemoryInfo)(OrtMemoryInfo *);
    void (*ReleaseSession)(OrtSession *);
    void (*ReleaseValue)(OrtValue *);
    void (*ReleaseRunOptions)(OrtRunOptions *);
    void (*ReleaseTypeInfo)(OrtTypeInfo *);
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *);
    void (*ReleaseSessionOptions)(OrtSessionOptions *); /* 100 */
} OrtApi;

typedef struct OrtApiBase {
    const OrtApi *(*GetApi)(uint32_t);
    const char *(*GetVersionString)(void);
} OrtApiBase;

const OrtApiBase *OrtGetApiBase(void);
#endif
