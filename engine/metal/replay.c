// Sends a table of Objective-C messages: a whole command buffer in one call from Python. It links nothing: the address
// of objc_msgSend is an argument.
#include <stdint.h>

enum { MESSAGE, BUFFER, DISPATCH };

typedef struct {
  uint16_t to, into, kind, pad;   // numbers of objects: the receiver, and where the result goes (0: nowhere)
  void* selector;
  uint64_t a[6];
} Message;

typedef struct { uint64_t x, y, z; } Size;

#ifdef _WIN32
__declspec(dllexport)
#else
__attribute__((visibility("default")))
#endif
// BUFFER: setBuffer:offset:atIndex: of the plan's buffer a[0], a[1] bytes after its first. DISPATCH: two MTLSize, which
// an ABI may pass in memory. MESSAGE: up to six numbers or pointers.
void lz_replay(void* send, const Message* message, int64_t count, void** objects, void* const* buffers,
               const uint64_t* offsets) {
  typedef void* (*Plain)(void*, void*, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
  typedef void (*SetBuffer)(void*, void*, void*, uint64_t, uint64_t);
  typedef void (*Dispatch)(void*, void*, Size, Size);
  for (const Message* end = message + count; message < end; message++) {
    const uint64_t* a = message->a;
    void* to = objects[message->to];
    if (message->kind == BUFFER) {
      ((SetBuffer)send)(to, message->selector, buffers[a[0]], a[1] + offsets[a[0]], a[2]);
    } else if (message->kind == DISPATCH) {
      ((Dispatch)send)(to, message->selector, (Size){a[0], a[1], a[2]}, (Size){a[3], a[4], a[5]});
    } else {
      void* result = ((Plain)send)(to, message->selector, a[0], a[1], a[2], a[3], a[4], a[5]);
      if (message->into) objects[message->into] = result;
    }
  }
}
