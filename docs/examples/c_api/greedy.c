/* A package of faq-onnx with onnxruntime's C API, as it is: greedy tokens behind a prompt.
 *
 *   cc -O2 greedy.c -I ONNXRUNTIME/include -L ONNXRUNTIME/lib -lonnxruntime -o greedy
 *   ./greedy out/model.onnx 16 1 2 3
 *
 * For models whose cache is float32. Every tensor of a step is released after the next one.
 */
#include <onnxruntime_c_api.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_VALUES = 512, MOST_TOKENS = 4096, RANK = 4, NAME = 64 };

static const OrtApi *api;

static void check(OrtStatus *status) {
    if (status != NULL) {
        fprintf(stderr, "onnxruntime: %s\n", api->GetErrorMessage(status));
        exit(1);
    }
}

static OrtValue *tensor(OrtMemoryInfo *memory, void *data, size_t bytes, const int64_t *shape,
                        size_t rank, ONNXTensorElementDataType type) {
    OrtValue *value = NULL;
    check(api->CreateTensorWithDataAsOrtValue(memory, data, bytes, shape, rank, type, &value));
    return value;
}

static OrtValue *integers(OrtMemoryInfo *memory, int64_t *data, int64_t count) {
    int64_t shape[] = {1, count};
    return tensor(memory, data, (size_t)count * sizeof *data, shape, 2,
                  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
}

/* An empty cache [1, heads, 0, width]; heads and width are those of the input. */
static OrtValue *empty_cache(OrtSession *session, OrtMemoryInfo *memory, size_t index) {
    static float nothing;
    int64_t shape[RANK];
    OrtTypeInfo *type = NULL;
    const OrtTensorTypeAndShapeInfo *info = NULL;
    check(api->SessionGetInputTypeInfo(session, index, &type));
    check(api->CastTypeInfoToTensorInfo(type, &info));
    check(api->GetDimensions(info, shape, RANK));
    api->ReleaseTypeInfo(type);
    shape[0] = 1;
    shape[2] = 0;
    return tensor(memory, &nothing, 0, shape, RANK, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
}

/* The best token behind the last position of logits [1, length, vocabulary]. */
static int64_t best_token(OrtValue *logits) {
    int64_t shape[3];
    float *data = NULL;
    OrtTensorTypeAndShapeInfo *info = NULL;
    check(api->GetTensorTypeAndShape(logits, &info));
    check(api->GetDimensions(info, shape, 3));
    api->ReleaseTensorTypeAndShapeInfo(info);
    check(api->GetTensorMutableData(logits, (void **)&data));
    const float *row = data + (shape[1] - 1) * shape[2];
    int64_t best = 0;
    for (int64_t token = 1; token < shape[2]; token++)
        if (row[token] > row[best]) best = token;
    return best;
}

int main(int count, char **words) {
    static int64_t ids[MOST_TOKENS], ones[MOST_TOKENS], positions[MOST_TOKENS];
    static char input_names[MOST_VALUES][NAME], output_names[MOST_VALUES][NAME];
    const char *inputs_of[MOST_VALUES], *outputs_of[MOST_VALUES];
    OrtValue *inputs[MOST_VALUES] = {0}, *outputs[MOST_VALUES] = {0};
    int cache_input[MOST_VALUES], caches = 0;
    if (count < 4) {
        fprintf(stderr, "usage: %s MODEL.onnx COUNT TOKEN...\n", words[0]);
        return 2;
    }

    api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    OrtEnv *env = NULL;
    OrtSessionOptions *options = NULL;
    OrtSession *session = NULL;
    OrtMemoryInfo *memory = NULL;
    OrtAllocator *allocator = NULL;
    check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "greedy", &env));
    check(api->CreateSessionOptions(&options));
    check(api->CreateSession(env, words[1], options, &session));
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    check(api->GetAllocatorWithDefaultOptions(&allocator));

    size_t values = 0;
    check(api->SessionGetInputCount(session, &values));
    snprintf(output_names[0], NAME, "logits");
    for (size_t n = 0; n < values; n++) {
        char *name = NULL;
        check(api->SessionGetInputName(session, n, allocator, &name));
        snprintf(input_names[n], NAME, "%s", name);
        inputs_of[n] = input_names[n];
        if (strncmp(name, "past_key_values", 15) == 0) {
            snprintf(output_names[caches + 1], NAME, "present%s", name + 15);
            inputs[n] = empty_cache(session, memory, n);
            cache_input[caches++] = (int)n;
        }
        check(api->AllocatorFree(allocator, name));
    }
    for (int n = 0; n <= caches; n++) outputs_of[n] = output_names[n];

    int64_t length = 0, read = count - 3;
    for (int64_t n = 0; n < MOST_TOKENS; n++) ones[n] = 1, positions[n] = n;
    for (int64_t n = 0; n < read; n++) ids[n] = atoll(words[3 + n]);
    for (int step = 0; step < atoi(words[2]) && length + read <= MOST_TOKENS; step++) {
        for (size_t n = 0; n < values; n++) {
            if (strcmp(inputs_of[n], "input_ids") == 0) inputs[n] = integers(memory, ids, read);
            if (strcmp(inputs_of[n], "attention_mask") == 0)
                inputs[n] = integers(memory, ones, length + read);
            if (strcmp(inputs_of[n], "position_ids") == 0)
                inputs[n] = integers(memory, positions + length, read);
        }
        memset(outputs, 0, sizeof outputs);
        check(api->Run(session, NULL, inputs_of, (const OrtValue *const *)inputs, values,
                       outputs_of, (size_t)caches + 1, outputs));
        length += read;
        read = 1;
        ids[0] = best_token(outputs[0]);
        printf("%lld ", (long long)ids[0]);
        api->ReleaseValue(outputs[0]);
        for (size_t n = 0; n < values; n++) api->ReleaseValue(inputs[n]);
        for (int n = 0; n < caches; n++) inputs[cache_input[n]] = outputs[n + 1];
    }
    printf("\n");

    for (int n = 0; n < caches; n++) api->ReleaseValue(inputs[cache_input[n]]);
    api->ReleaseMemoryInfo(memory);
    api->ReleaseSession(session);
    api->ReleaseSessionOptions(options);
    api->ReleaseEnv(env);
    return 0;
}
