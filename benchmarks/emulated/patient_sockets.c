/* Sockets that wait for their data: preloaded into a rank of `emulated.py`.

   MLX's ring asks its sockets again and again while it waits, with a processor for each socket. On a
   host of its own that costs nothing. Where several hosts share two processors they would wait for
   one another's asking, and not for the link. So whoever would be told to try again is told so a
   little later, or as soon as there is something. */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const struct timespec LONGEST = {0, 300000}; /* 0.3 ms: the other direction may be asked for */

static ssize_t later(int fd, short what, ssize_t result) {
  if (result < 0 && errno == EAGAIN) {
    struct pollfd one = {fd, what, 0};
    ppoll(&one, 1, &LONGEST, 0);
    errno = EAGAIN;
  }
  return result;
}

ssize_t recv(int fd, void *buffer, size_t size, int flags) {
  return later(fd, POLLIN, syscall(SYS_recvfrom, fd, buffer, size, flags, 0, 0));
}

ssize_t send(int fd, const void *buffer, size_t size, int flags) {
  return later(fd, POLLOUT, syscall(SYS_sendto, fd, buffer, size, flags, 0, 0));
}
