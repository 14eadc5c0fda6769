/* proctrack/leaders signals as Slurm's proctrack/cgroup does, the usual setting of clusters: a signal reaches only the
 * tasks of a step, which are the direct children of slurmstepd. KILL reaches every process below. cgroups need rights
 * that a sandbox lacks, so proctrack/linuxproc does the rest, whose containers are named by the pid of slurmstepd. */
#include <dirent.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#include <slurm/slurm.h>

const char plugin_name[] = "Process tracking that signals the leaders of tasks";
const char plugin_type[] = "proctrack/leaders";
const uint32_t plugin_version = SLURM_VERSION_NUMBER;

static void *linuxproc(const char *function)
{
    static void *library;
    if (!library) library = dlopen(PLUGIN_DIR "/proctrack_linuxproc.so", RTLD_NOW);
    void *found = library ? dlsym(library, function) : NULL;
    if (!found) { fprintf(stderr, "proctrack/leaders: %s\n", dlerror()); abort(); }
    return found;
}

extern int init(void) { return SLURM_SUCCESS; }
extern int fini(void) { return SLURM_SUCCESS; }
extern int proctrack_p_create(void *step) { return ((int (*)(void *)) linuxproc("proctrack_p_create"))(step); }
extern int proctrack_p_add(void *step, pid_t pid)
{
    return ((int (*)(void *, pid_t)) linuxproc("proctrack_p_add"))(step, pid);
}
extern int proctrack_p_destroy(uint64_t id) { return ((int (*)(uint64_t)) linuxproc("proctrack_p_destroy"))(id); }
extern uint64_t proctrack_p_find(pid_t pid) { return ((uint64_t (*)(pid_t)) linuxproc("proctrack_p_find"))(pid); }
extern bool proctrack_p_has_pid(uint64_t id, pid_t pid)
{
    return ((bool (*)(uint64_t, pid_t)) linuxproc("proctrack_p_has_pid"))(id, pid);
}
extern int proctrack_p_wait(uint64_t id) { return ((int (*)(uint64_t)) linuxproc("proctrack_p_wait"))(id); }
extern int proctrack_p_get_pids(uint64_t id, pid_t **pids, int *number)
{
    return ((int (*)(uint64_t, pid_t **, int *)) linuxproc("proctrack_p_get_pids"))(id, pids, number);
}

extern int proctrack_p_signal(uint64_t id, int number)
{
    if (number == SIGKILL) return ((int (*)(uint64_t, int)) linuxproc("proctrack_p_signal"))(id, number);
    DIR *proc = opendir("/proc");
    for (struct dirent *e; proc && (e = readdir(proc));) {
        char path[300], state; int pid, parent;
        snprintf(path, sizeof path, "/proc/%s/stat", e->d_name);
        FILE *f = atoi(e->d_name) ? fopen(path, "re") : NULL;
        if (!f) continue;
        int got = fscanf(f, "%d (%*[^)]) %c %d", &pid, &state, &parent);
        fclose(f);
        if (got == 3 && (uint64_t) parent == id) kill(pid, number);
    }
    if (proc) closedir(proc);
    return SLURM_SUCCESS;
}
