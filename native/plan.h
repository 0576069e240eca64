/* What the host's and the GPU's copies share. */
#ifndef LMKV_PLAN_H
#define LMKV_PLAN_H

#include <stddef.h>
#include <stdint.h>

#include "lmkv.h"

/* Write a message into `why`; returns -1. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
int64_t lmkv_refuse(char *why, size_t room, const char *form, ...);

#endif
